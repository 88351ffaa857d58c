"""Datasets of conversations to datasets of rows, cached, in several processes, or as a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase, logging

from ..trees.rows import Row
from .arrow import ROWS_VERSION, row_features, rows_to_table
from .bad_rows import BadRowError, RowErrors, group_errors, reason_of, refusal
from .conversations import COUNT_COLUMNS, no_rows, rows_of
from .dataset_format import column_names
from .packed_dataset import pack_dataset
from .report import PreparationReport, report_of
from .settings import BadRows, RowSettings
from .streaming import stream_rows
from .tokenized_turns import gather_turns, is_single_turn
from .tokenizer_fingerprint import tokenizer_fingerprint


logger = logging.get_logger(__name__)

# Conversations that a process prepares before it writes them.
_PREPARED_AT_ONCE = 32
_REASON = "bad_row"  # column with the reason why a row cannot be trained


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    *,
    packing: bool = False,
    bad_rows: BadRows = "error",
    num_proc: int | None = None,
    name: str = "train",
) -> Dataset | IterableDataset:
    """
    Return a dataset of conversations as a dataset of rows; what it held and what of it is lost is logged.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset`):
            Conversations.
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        settings (`RowSettings`):
            Bounds; with packing, `max_row_tokens` is the capacity of a row.
        packing (`bool`, *optional*, defaults to `False`):
            Whether several conversations share a row.
        bad_rows (`str`, *optional*, defaults to `"error"`):
            Whether rows that cannot be trained stop the preparation, which names all of them, or are left out and
            counted (`"drop"`).
        num_proc (`int`, *optional*):
            Number of processes; a streamed dataset is prepared on the fly.
        name (`str`, *optional*, defaults to `"train"`):
            Name of the dataset in progress bars and log.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: The rows.

    Raises:
        `RenderingError`: If rows cannot be rendered without losing part of a turn, and may not be left out.
        `ValueError`: If no turn of the dataset is trained.
    """
    of_log: tuple[RowErrors, ...] = ()
    if is_single_turn(column_names(dataset)):
        dataset, of_log = gather_turns(dataset, len(tokenizer), bad_rows=bad_rows, num_proc=num_proc, name=name)
    if isinstance(dataset, IterableDataset):
        return stream_rows(dataset, tokenizer, settings, packing=packing, bad_rows=bad_rows, name=name)
    rows, report = conversations_to_rows(dataset, tokenizer, settings, bad_rows=bad_rows, num_proc=num_proc, name=name)
    report = replace(report, bad_rows=(*of_log, *report.bad_rows))
    (logger.info if report.is_complete else logger.warning)(f"{name} dataset: {report}.")
    if report.num_row_tokens == 0:
        way_out = "Raise max_length, or set it to None" if report.num_cut_tokens else "Repair its rows"
        raise ValueError(f"No turn of the {name} dataset is trained: {report}. {way_out}.")
    if packing:
        assert settings.max_row_tokens is not None, "packing needs the capacity of a row"
        rows, packed = pack_dataset(rows, settings.max_row_tokens, num_proc=num_proc, name=name)
        logger.info(f"{name} dataset: {packed}.")
        return rows
    if report.num_dropped_conversations or report.num_bad_rows:
        rows = rows.select(np.flatnonzero(rows.data.table["num_tokens"].to_numpy()))
    return rows.remove_columns([*COUNT_COLUMNS, _REASON])


def conversations_to_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    *,
    bad_rows: BadRows = "error",
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset, PreparationReport]:
    """
    Return each conversation of a dataset as its rows.

    The result is cached by `datasets` under a fingerprint of the dataset, the tokenizer's rules and the settings:
    other training arguments, or having used the tokenizer before, prepare nothing again.

    Args:
        dataset (`datasets.Dataset`):
            Conversations.
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        settings (`RowSettings`):
            Bounds.
        bad_rows (`str`, *optional*, defaults to `"error"`):
            Whether rows that cannot be trained are refused, or left out (`"drop"`).
        num_proc (`int`, *optional*):
            Number of processes.
        name (`str`, *optional*, defaults to `"train"`):
            Name of the dataset for the progress bar.

    Returns:
        `tuple[Dataset, PreparationReport]`: Rows with `COUNT_COLUMNS`, an empty one for a conversation of which
        nothing is trained; and what they held and lost.

    Raises:
        `RenderingError`: If rows cannot be rendered without losing part of a turn, and may not be left out.
    """
    state = ("rows", ROWS_VERSION, dataset._fingerprint, tokenizer_fingerprint(tokenizer), repr(settings))
    rows = dataset.map(
        _prepare_batch,
        with_indices=True,
        batched=True,
        batch_size=_PREPARED_AT_ONCE,
        fn_kwargs={"tokenizer": tokenizer, "settings": settings},
        remove_columns=dataset.column_names,
        features=Features({**row_features(COUNT_COLUMNS), _REASON: Value("string")}),
        num_proc=num_proc,
        new_fingerprint=Hasher.hash(state),
        desc=f"Building prefix trees of {name} dataset",
    )
    table = rows.data.table
    counts = {column: table[column].to_pylist() for column in COUNT_COLUMNS}
    reasons = zip(counts["conversation"], table[_REASON].to_pylist(), strict=True)
    bad = [(index, reason) for index, reason in reasons if reason is not None]
    if bad and bad_rows == "error":
        raise refusal(group_errors(bad), len(dataset), name)
    return rows, report_of(counts, table["num_tokens"].to_pylist(), settings.bound, bad_rows=bad)


def _prepare_batch(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
) -> pa.Table:
    rows: list[Row] = []
    counts: list[dict[str, int]] = []
    reasons: list[str | None] = []
    for position, index in enumerate(indices):
        example = {name: values[position] for name, values in batch.items()}
        reason = None
        try:
            of_one, counts_of_one = rows_of(example, index, tokenizer, settings)
        except BadRowError as error:
            (of_one, counts_of_one), reason = no_rows(index), reason_of(error, index)
        rows += of_one
        counts += counts_of_one
        reasons += [reason] * len(of_one)
    table = rows_to_table(rows, counts, row_features(COUNT_COLUMNS))
    return table.append_column(_REASON, pa.array(reasons, pa.string()))
