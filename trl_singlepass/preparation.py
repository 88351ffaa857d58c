"""Datasets of conversations to datasets of rows, cached, in several processes, or as a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase, logging
from trl import is_conversational
from trl.data_utils import get_dataset_column_names, is_conversational_from_value

from .conversation_rows import COUNT_COLUMNS, rows_of
from .packed_dataset import pack_dataset
from .preparation_report import PreparationReport, report_of
from .row_tables import ROWS_VERSION, row_features, rows_to_table
from .rows import ROW_COLUMNS, Row
from .settings import RowSettings
from .streaming import stream_rows
from .tokenized_turns import gather_turns, is_single_turn
from .tokenizer_fingerprint import tokenizer_fingerprint


logger = logging.get_logger(__name__)

# Conversations that a process prepares before it writes them.
_PREPARED_AT_ONCE = 32


def holds_conversations(example: Mapping[str, Any]) -> bool:
    """
    Return whether a dataset row is a conversation, whose turns one pass can train.

    Args:
        example (`Mapping[str, Any]`):
            First row of a dataset.

    Returns:
        `bool`: `True` for `messages`, conversational `prompt` + `completion`, ShareGPT `conversations`, and turns
        that are tokens already (`turns`, or one per row); `False` for plain text and tokenised rows, which stock
        `SFTTrainer` trains as they are.
    """
    if "input_ids" in example:
        return False
    if "turns" in example or is_single_turn(example):
        return True
    return bool(is_conversational(example) or is_conversational_from_value(example))


def holds_rows(column_names: list[str]) -> bool:
    """Return whether a dataset with these columns has already been prepared."""
    return set(ROW_COLUMNS) <= set(column_names)


def holds_turns(dataset: Dataset | IterableDataset) -> bool:
    """Return whether a dataset holds conversations, or rows that were prepared from them."""
    if holds_rows(get_dataset_column_names(dataset)):
        return True
    return holds_conversations(next(iter(dataset)))


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    *,
    packing: bool = False,
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
        num_proc (`int`, *optional*):
            Number of processes; a streamed dataset is prepared on the fly.
        name (`str`, *optional*, defaults to `"train"`):
            Name of the dataset in progress bars and log.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: The rows.

    Raises:
        `RenderingError`: If a row cannot be rendered without losing part of a turn.
        `ValueError`: If no turn of the dataset is trained.
    """
    if is_single_turn(get_dataset_column_names(dataset)):
        dataset = gather_turns(dataset)
    if isinstance(dataset, IterableDataset):
        return stream_rows(dataset, tokenizer, settings, packing=packing, name=name)
    rows, report = conversations_to_rows(dataset, tokenizer, settings, num_proc=num_proc, name=name)
    (logger.info if report.is_complete else logger.warning)(f"{name} dataset: {report}.")
    if report.num_row_tokens == 0:
        raise ValueError(f"No turn of the {name} dataset is trained: {report}. Raise max_length, or set it to None.")
    if packing:
        assert settings.max_row_tokens is not None, "packing needs the capacity of a row"
        rows, packed = pack_dataset(rows, settings.max_row_tokens, num_proc=num_proc, name=name)
        logger.info(f"{name} dataset: {packed}.")
        return rows
    if report.num_dropped_conversations:
        rows = rows.select(np.flatnonzero(rows.data.table["num_tokens"].to_numpy()))
    return rows.remove_columns(list(COUNT_COLUMNS))


def conversations_to_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    *,
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
        num_proc (`int`, *optional*):
            Number of processes.
        name (`str`, *optional*, defaults to `"train"`):
            Name of the dataset for the progress bar.

    Returns:
        `tuple[Dataset, PreparationReport]`: Rows with `COUNT_COLUMNS`, an empty one for a conversation of which
        nothing is trained; and what they held and lost.

    Raises:
        `RenderingError`: If a row cannot be rendered without losing part of a turn.
    """
    features = row_features(COUNT_COLUMNS)
    state = ("rows", ROWS_VERSION, dataset._fingerprint, tokenizer_fingerprint(tokenizer), repr(settings))
    rows = dataset.map(
        _prepare_batch,
        with_indices=True,
        batched=True,
        batch_size=_PREPARED_AT_ONCE,
        fn_kwargs={"tokenizer": tokenizer, "settings": settings, "features": features},
        remove_columns=get_dataset_column_names(dataset),
        features=features,
        num_proc=num_proc,
        new_fingerprint=Hasher.hash(state),
        desc=f"Building prefix trees of {name} dataset",
    )
    table = rows.data.table
    counts = {column: table[column].to_pylist() for column in COUNT_COLUMNS}
    return rows, report_of(counts, table["num_tokens"].to_pylist(), settings.bound)


def _prepare_batch(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    features: Features,
) -> pa.Table:
    rows: list[Row] = []
    counts: list[dict[str, int]] = []
    for position, index in enumerate(indices):
        example = {name: values[position] for name, values in batch.items()}
        of_one, counts_of_one = rows_of(example, index, tokenizer, settings)
        rows += of_one
        counts += counts_of_one
    return rows_to_table(rows, counts, features)
