"""Prepare datasets: from conversations to rows, cached, in several processes, or as a stream."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher
from datasets.utils.tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import get_logger

from ..trees.rows import Row
from .arrow import ROWS_VERSION, row_features, rows_to_table
from .bad_rows import BadRowError, BadRows, RowErrors, bad_rows_error, get_reason, group_errors
from .conversations import COUNT_COLUMNS, example_to_rows, no_rows
from .dataset_format import column_names
from .packed_dataset import pack_dataset
from .report import PreparationReport
from .settings import RowSettings
from .streaming import stream_rows
from .tokenized_turns import gather_turns, is_single_turn


logger = get_logger(__name__)

# Conversations that a process prepares before it writes their rows.
_PREPARED_AT_ONCE = 32
_REASON = "bad_row"  # column with the reason why an example cannot be trained
# A serialised tokenizer begins with its version and with the truncation and padding of its last call.
_AFTER_LAST_CALL = '"added_tokens"'


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    *,
    packing: bool = False,
    bad_rows: BadRows = BadRows.ERROR,
    num_proc: int | None = None,
    name: str = "train",
    is_main_process: bool = True,
) -> Dataset | IterableDataset:
    """
    Return a dataset of conversations as a dataset of rows, and say what it held and what is lost.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset`):
            Conversations.
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        settings (`RowSettings`):
            How conversations become rows; with packing, `max_row_tokens` is the capacity of a row.
        packing (`bool`, *optional*, defaults to `False`):
            Whether several conversations share a row.
        bad_rows (`BadRows`, *optional*, defaults to `"error"`):
            What happens to examples that cannot be trained.
        num_proc (`int`, *optional*):
            Number of processes; a stream is prepared on the fly.
        name (`str`, *optional*, defaults to `"train"`):
            Name of the dataset in progress bars and log.
        is_main_process (`bool`, *optional*, defaults to `True`):
            Whether this process is the one that prints the summary.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: The rows.

    Raises:
        `RenderingError`: If examples cannot be rendered without losing part of a turn, and may not be left out.
        `ValueError`: If no turn of the dataset is trained.
    """
    bad_turns: tuple[RowErrors, ...] = ()
    if is_single_turn(column_names(dataset)):
        dataset, bad_turns = gather_turns(dataset, len(tokenizer), bad_rows=bad_rows, num_proc=num_proc, name=name)
    if isinstance(dataset, IterableDataset):
        return stream_rows(dataset, tokenizer, settings, packing=packing, bad_rows=bad_rows, name=name)
    rows, report = conversations_to_rows(dataset, tokenizer, settings, bad_rows=bad_rows, num_proc=num_proc, name=name)
    report = replace(report, bad_rows=(*bad_turns, *report.bad_rows))
    if report.num_row_tokens == 0:
        way_out = "Raise max_length, or set it to None" if report.num_cut_tokens else "Repair its rows"
        raise ValueError(f"No turn of the {name} dataset is trained: {report}. {way_out}.")
    if packing:
        assert settings.max_row_tokens is not None, "packing needs the capacity of a row"
        rows, packed = pack_dataset(rows, settings.max_row_tokens, num_proc=num_proc, name=name)
        summary = f"{report}; {packed}"
    else:
        rows, summary = _without_counts(rows, report), str(report)
    if is_main_process:
        say(f"{name} dataset: {summary}.", logging.INFO if report.is_complete else logging.WARNING)
    return _described(rows, summary)


def _without_counts(rows: Dataset, report: PreparationReport) -> Dataset:
    """Return rows without empty ones, and without the columns that only the report reads."""
    if report.num_dropped_conversations or report.num_bad_rows:
        rows = rows.select(np.flatnonzero(rows.data.table["num_tokens"].to_numpy()))
    return rows.remove_columns([*COUNT_COLUMNS, _REASON])


def _described(rows: Dataset, summary: str) -> Dataset:
    """Return rows that describe themselves by the summary of their preparation, for the model card."""
    rows.info.description = summary
    return rows


def say(summary: str, level: int) -> None:
    """Log a summary; where the log does not show it, write it beside the progress bars."""
    if logger.isEnabledFor(level):
        logger.log(level, summary)
    else:
        tqdm.write(summary, file=sys.stderr)


def conversations_to_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    *,
    bad_rows: BadRows = BadRows.ERROR,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset, PreparationReport]:
    """
    Return the rows of every conversation in a dataset, and what the conversations held and lost.

    `datasets` caches the rows under a fingerprint of the dataset, the tokenizer's rules and the settings: nothing is
    prepared again because other training arguments changed or the tokenizer was used.

    Arguments and errors are those of [`prepare_dataset`].

    Returns:
        `tuple[Dataset, PreparationReport]`: Rows with `COUNT_COLUMNS`, an empty one for a conversation of which
        nothing is trained; and the report.
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
    if bad and bad_rows == BadRows.ERROR:
        raise bad_rows_error(group_errors(bad), len(dataset), name)
    lengths = table["num_tokens"].to_pylist()
    return rows, PreparationReport.from_counts(counts, lengths, settings.bound, bad_rows=bad)


def _prepare_batch(
    batch: Mapping[str, Sequence[object]],
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
            new_rows, new_counts = example_to_rows(example, index, tokenizer, settings)
        except BadRowError as error:
            (new_rows, new_counts), reason = no_rows(index), get_reason(error, index)
        rows += new_rows
        counts += new_counts
        reasons += [reason] * len(new_rows)
    table = rows_to_table(rows, counts, row_features(COUNT_COLUMNS))
    return table.append_column(_REASON, pa.array(reasons, pa.string()))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Return a hash of a tokenizer that does not change when the tokenizer is used.

    A fast tokenizer remembers the padding and truncation of its last call, which would make `datasets` prepare
    everything again.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Tokenizer.

    Returns:
        `str`: Hash of its vocabulary, rules, special tokens and chat template.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: object = sorted(tokenizer.get_vocab().items())
    else:
        serialised: str = backend.to_str()
        rules = serialised[max(serialised.find(_AFTER_LAST_CALL), 0) :]
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return str(Hasher.hash((type(tokenizer).__name__, rules, special, tokenizer.chat_template)))
