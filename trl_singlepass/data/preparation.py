"""Prepare datasets: from conversations to rows, cached, in several processes, or as a stream."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher
from datasets.utils.tqdm import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.logging import get_logger

from ..images.loading import EncodedImage, image_loader_of
from ..images.placeholders import placeholders_of
from ..trees.rows import Row
from .arrow import ROWS_VERSION, row_features, rows_to_table
from .bad_rows import BadRowError, BadRows, RowErrors, bad_rows_error, get_reason, group_errors
from .conversations import COUNT_COLUMNS, IMAGE_COUNT_COLUMNS, example_to_rows, no_rows
from .dataset_format import column_names
from .images import undecoded
from .kept_columns import keep_columns
from .packed_dataset import pack_dataset
from .report import PreparationReport
from .settings import RowSettings
from .streaming import stream_rows
from .tokenized_turns import gather_turns, is_single_turn
from .vision import ConversationReader, get_tokenizer, images_of_example, reader_for


logger = get_logger(__name__)

# Conversations that a process prepares before it writes their rows.
_PREPARED_AT_ONCE = 32
_REASON = "bad_row"  # column with the reason why an example cannot be trained
_COUNTS = (*COUNT_COLUMNS, *IMAGE_COUNT_COLUMNS, _REASON)
# A serialised tokenizer begins with its version and with the truncation and padding of its last call.
_AFTER_LAST_CALL = '"added_tokens"'


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    settings: RowSettings | None = None,
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
        tokenizer (`transformers.PreTrainedTokenizerBase` or `transformers.ProcessorMixin`):
            Tokenizer with a chat template, or, for conversations with images, the processor.
        settings (`RowSettings`, *optional*):
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
        `datasets.Dataset` or `datasets.IterableDataset`: The rows. Unless several conversations share a row, they
        keep the columns of their conversations (see [`keep_columns`]).

    Raises:
        `RenderingError`: If examples cannot be rendered without losing part of a turn, and may not be left out.
        `ValueError`: If no turn of the dataset is trained.
    """
    settings = settings or RowSettings()
    bad_turns: tuple[RowErrors, ...] = ()
    if is_single_turn(column_names(dataset)):
        vocab_size = len(get_tokenizer(tokenizer))
        dataset, bad_turns = gather_turns(dataset, vocab_size, bad_rows=bad_rows, num_proc=num_proc, name=name)
    tokenizer = reader_for(dataset, tokenizer)
    loader = image_loader_of(tokenizer)
    if isinstance(dataset, Dataset) and loader is not None:
        loader.add_dataset(dataset._fingerprint, partial(_images_of_row, undecoded(dataset)))
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
        rows, summary = _with_columns_of(dataset, rows, name), str(report)
    if is_main_process:
        say(f"{name} dataset: {summary}.", logging.INFO if report.is_complete else logging.WARNING)
    return _described(rows, summary)


def _images_of_row(dataset: Dataset, index: int) -> list[EncodedImage]:
    return images_of_example(dataset[index])


def _with_columns_of(examples: Dataset, rows: Dataset, name: str) -> Dataset:
    """Return rows without empty ones, with the columns of their examples for those that only the report reads."""
    of_example, lengths = (rows.data.table[column].to_numpy() for column in ("conversation", "num_tokens"))
    rows = rows.remove_columns([column for column in rows.column_names if column in _COUNTS])
    rows = keep_columns(rows, examples, of_example, name=name)
    return rows if lengths.all() else rows.select(np.flatnonzero(lengths))


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
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
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

    Arguments and errors are those of [`prepare_dataset`]. Each row has `COUNT_COLUMNS`, and a conversation of which
    nothing is trained has an empty one.
    """
    has_images = isinstance(tokenizer, ProcessorMixin)
    reader = ConversationReader(placeholders_of(tokenizer), dataset._fingerprint) if has_images else tokenizer
    count_columns = (*COUNT_COLUMNS, *IMAGE_COUNT_COLUMNS) if has_images else COUNT_COLUMNS
    features = row_features(count_columns, has_images=has_images)
    state = ("rows", ROWS_VERSION, dataset._fingerprint, tokenizer_fingerprint(tokenizer), repr(settings))
    encoded = undecoded(dataset) if has_images else dataset
    rows = encoded.map(
        _prepare_batch,
        with_indices=True,
        batched=True,
        batch_size=_PREPARED_AT_ONCE,
        fn_kwargs={"tokenizer": reader, "settings": settings, "features": features},
        remove_columns=dataset.column_names,
        features=Features({**features, _REASON: Value("string")}),
        num_proc=num_proc,
        new_fingerprint=Hasher.hash(state),
        desc=f"Building prefix trees of {name} dataset",
    )
    table = rows.data.table
    counts = {column: table[column].to_pylist() for column in count_columns}
    reasons = zip(counts["conversation"], table[_REASON].to_pylist(), strict=True)
    bad = [(index, reason) for index, reason in reasons if reason is not None]
    if bad and bad_rows == BadRows.ERROR:
        raise bad_rows_error(group_errors(bad), len(dataset), name)
    lengths = table["num_tokens"].to_pylist()
    return rows, PreparationReport.from_counts(counts, lengths, settings.bound, bad_rows=bad)


def _prepare_batch(
    batch: Mapping[str, Sequence[object]],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | ConversationReader,
    settings: RowSettings,
    features: Features,
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
    table = rows_to_table(rows, counts, features)
    return table.append_column(_REASON, pa.array(reasons, pa.string()))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> str:
    """
    Return a hash of a tokenizer or processor that does not change when it is used.

    A fast tokenizer remembers the padding and truncation of its last call, which would make `datasets` prepare
    everything again.

    The hash covers vocabulary, rules, special tokens and chat template; of a processor, its settings too.
    """
    if isinstance(tokenizer, ProcessorMixin):
        of_tokenizer = tokenizer_fingerprint(tokenizer.tokenizer)
        return str(Hasher.hash((of_tokenizer, tokenizer.to_json_string(), tokenizer.chat_template)))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: object = sorted(tokenizer.get_vocab().items())
    else:
        serialised: str = backend.to_str()
        rules = serialised[max(serialised.find(_AFTER_LAST_CALL), 0) :]
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return str(Hasher.hash((type(tokenizer).__name__, rules, special, tokenizer.chat_template)))
