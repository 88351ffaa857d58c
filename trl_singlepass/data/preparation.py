"""Prepare datasets: from conversations or pairs to rows, cached, in several processes, or as a stream."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from datasets.utils.tqdm import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.logging import get_logger

from ..images.loading import EncodedImage, image_loader_of
from ..images.placeholders import placeholders_of
from ..rendering.tokenization import map_while_tokenizing
from ..trees.rows import Row
from .arrow import (
    ROWS_VERSION,
    has_image_columns,
    keep_columns,
    kept_values,
    row_features,
    to_columns,
    to_table,
)
from .bad_rows import (
    BadRowError,
    BadRows,
    RowErrors,
    StreamedBadRows,
    StreamLog,
    bad_rows_error,
    get_reason,
    group_errors,
)
from .conversations import example_to_rows
from .dataset_format import EXAMPLE, column_names, in_one_column
from .files import naming_full_disk
from .fingerprint import tokenizer_fingerprint
from .images import undecoded
from .packing import pack_dataset, pack_rows
from .pairs import PAIR_COLUMNS, REFERENCE_COLUMNS, SIDES, images_name, images_of_trajectory, pair_to_rows
from .reader import ConversationReader, Reader, get_tokenizer, images_of_example, reader_for
from .report import PackingReport, Report
from .rows import COUNTS, PreparedRow, empty_row
from .settings import PairSettings, RowSettings
from .tokenized_turns import gather_turns, is_single_turn


logger = get_logger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset
PACKING_BUFFER = 512
"""Conversations of a stream that are packed together. More fill rows better; fewer start sooner and resume faster."""
# Examples that a process prepares before it hands on their rows, of a dataset on disk and of a stream.
_STORED_AT_ONCE, _STREAMED_AT_ONCE = 32, 8
# What stands beside a row until its report is made: the index of its example, `COUNTS`, the name of a turn that is too
# long, and the reason why its example cannot be trained.
_RECORD = {
    "example": Value("int64"),
    "counts": List(Value("int64")),
    "overlong": Value("string"),
    "bad_row": Value("string"),
}


class BoundedSamples(Protocol):
    """Settings by which examples become rows."""

    @property
    def bound(self) -> str | None:
        """Name of the setting that bounds a sample."""


Settings = TypeVar("Settings", bound=BoundedSamples)


@dataclass(frozen=True, slots=True)
class ExampleKind(Generic[Settings]):
    """What differs between datasets of conversations, of pairs, and of whatever else becomes rows."""

    name: str  # what a report calls the examples
    # From an example, its index, what reads it and the settings to its rows; a `BadRowError` says why it has none. The
    # first row holds the counts of the example.
    to_rows: Callable[[Mapping[str, Any], int, Reader, Settings], list[PreparedRow]]
    # From an example to the images that its rows refer to, in their order, by what follows the name of the dataset in
    # the references.
    images: Mapping[str, Callable[[Mapping[str, Any]], Sequence[EncodedImage]]]
    labels: tuple[str, ...] = ()  # of the lists of samples in a row
    reserved: tuple[str, ...] = ()  # columns that are added to rows later


CONVERSATION_KIND: ExampleKind[RowSettings] = ExampleKind("conversation", example_to_rows, {"": images_of_example})
PAIR_KIND: ExampleKind[PairSettings] = ExampleKind(
    "pair",
    pair_to_rows,
    {images_name("", side): partial(images_of_trajectory, side=side) for side in SIDES},
    labels=SIDES,
    reserved=(*PAIR_COLUMNS, *REFERENCE_COLUMNS),
)


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
        keep the columns of their conversations.

    Raises:
        `RenderingError`: If examples cannot be rendered without losing part of a turn, and may not be left out.
        `ValueError`: If no turn of the dataset is trained.
    """
    bad_turns: tuple[RowErrors, ...] = ()
    if is_single_turn(column_names(dataset)):
        vocab_size = len(get_tokenizer(tokenizer))
        dataset, bad_turns = gather_turns(dataset, vocab_size, bad_rows=bad_rows, num_proc=num_proc, name=name)
    settings = settings or RowSettings()
    if packing and settings.max_row_tokens is None:
        raise ValueError("packing=True needs RowSettings(max_row_tokens=…), the capacity of a row.")
    return prepare(
        dataset,
        CONVERSATION_KIND,
        tokenizer,
        settings,
        capacity=settings.max_row_tokens if packing else None,
        bad_rows=bad_rows,
        bad_turns=bad_turns,
        num_proc=num_proc,
        name=name,
        is_main_process=is_main_process,
    )


def prepare(
    dataset: AnyDataset,
    kind: ExampleKind[Settings],
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    settings: Settings,
    *,
    capacity: int | None = None,
    bad_rows: BadRows = BadRows.ERROR,
    bad_turns: tuple[RowErrors, ...] = (),
    num_proc: int | None = None,
    name: str = "train",
    is_main_process: bool = True,
) -> AnyDataset:
    """
    Return a dataset of examples of one kind as a dataset of rows, and say what it held and what is lost.

    Rows are packed into fewer ones of at most `capacity` tokens, if it is given. `bad_turns` were left out before. All
    else is as in [`prepare_dataset`].
    """
    reader = reader_for(dataset, tokenizer)
    if isinstance(dataset, IterableDataset):
        return _prepare_stream(dataset, _StreamPreparation(kind, reader, settings, bad_rows, name, capacity), capacity)
    if (loader := image_loader_of(reader)) is not None:
        for suffix, images_of in kind.images.items():
            loader.add_dataset(dataset._fingerprint + suffix, partial(_images_at, undecoded(dataset), images_of))
    rows, report = examples_to_rows(dataset, kind, reader, settings, bad_rows=bad_rows, num_proc=num_proc, name=name)
    report = replace(report, bad_rows=(*bad_turns, *report.bad_rows))
    if report["num_row_tokens"] == 0:
        way_out = f"Raise {report.bound}, or set it to None" if report["num_cut_tokens"] else "Repair its rows"
        raise ValueError(f"No turn of the {name} dataset is trained: {report}. {way_out}.")
    if capacity is None:
        rows, summary = _with_columns_of(dataset, rows, kind.reserved, name), str(report)
    else:
        rows = pack_dataset(rows, capacity, num_proc=num_proc, name=name)
        summary = f"{report}; {PackingReport.from_rows(rows, capacity, report)}"
    if is_main_process:
        say(f"{name} dataset: {summary}.", logging.INFO if report.is_complete else logging.WARNING)
    rows.info.description = summary  # for the model card
    return rows


def _images_at(
    dataset: Dataset, images_of: Callable[[Mapping[str, Any]], Sequence[EncodedImage]], index: int
) -> Sequence[EncodedImage]:
    return images_of(dataset[index])


def _with_columns_of(examples: Dataset, rows: Dataset, reserved: Sequence[str], name: str) -> Dataset:
    """Return rows without empty ones, with the columns of their examples in the place of those that a report reads."""
    of_example = rows.data.table["example"].to_numpy()
    lengths = pc.list_value_length(rows.data.table["input_ids"]).to_numpy()
    rows = keep_columns(rows.remove_columns(list(_RECORD)), examples, of_example, reserved=reserved, name=name)
    return rows if lengths.all() else rows.select(np.flatnonzero(lengths))


def say(summary: str, level: int) -> None:
    """Log a summary; where the log does not show it, write it beside the progress bars."""
    if logger.isEnabledFor(level):
        logger.log(level, summary)
    else:
        tqdm.write(summary, file=sys.stderr)


# Datasets on disk ----------------------------------------------------------------------------------------------------


def examples_to_rows(
    dataset: Dataset,
    kind: ExampleKind[Settings],
    reader: PreTrainedTokenizerBase | ProcessorMixin,
    settings: Settings,
    *,
    bad_rows: BadRows = BadRows.ERROR,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset, Report]:
    """
    Return the rows of every example, an empty one where nothing of it is trained, and what the examples held and lost.

    `datasets` caches the rows under a fingerprint of the dataset, the tokenizer's rules and the settings: nothing is
    prepared again because other training arguments changed or the tokenizer was used.

    Arguments and errors are those of [`prepare`]. Beside each row stands what is counted of it.
    """
    has_images = isinstance(reader, ProcessorMixin)
    own = ConversationReader(placeholders_of(reader), dataset._fingerprint) if has_images else reader
    features = Features({**row_features(kind.labels, has_images=has_images), **_RECORD})
    state = (kind.name, ROWS_VERSION, dataset._fingerprint, tokenizer_fingerprint(reader), repr(settings))
    with naming_full_disk(Path(dataset._get_cache_file_path("")).parent):
        rows = (undecoded(dataset) if has_images else dataset).map(
            _prepare_batch,
            with_indices=True,
            batched=True,
            batch_size=_STORED_AT_ONCE,
            fn_kwargs={"kind": kind, "reader": own, "settings": settings, "features": features},
            remove_columns=dataset.column_names,
            features=features,
            num_proc=num_proc,
            new_fingerprint=Hasher.hash(state),
            desc=f"Building prefix trees of {name} dataset",
        )
    table = rows.data.table
    reasons = zip(table["example"].to_pylist(), table["bad_row"].to_pylist(), strict=True)
    errors = group_errors((index, reason) for index, reason in reasons if reason is not None)
    if errors and bad_rows == BadRows.ERROR:
        raise bad_rows_error(errors, len(dataset), name)
    return rows, Report.from_table(kind.name, settings.bound, table, errors)


def _prepare_batch(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    kind: ExampleKind[Settings],
    reader: Reader,
    settings: Settings,
    features: Features,
) -> pa.Table:
    rows: list[PreparedRow] = []
    record: dict[str, list[Any]] = {"example": [], "bad_row": []}
    examples = [{name: values[position] for name, values in batch.items()} for position in range(len(indices))]
    for index, found in zip(indices, _to_rows(examples, indices, kind, reader, settings), strict=True):
        if isinstance(found, BadRowError):
            new, reason = [PreparedRow(empty_row())], get_reason(found, index)
        else:
            new, reason = found, None
        rows += new
        record["example"] += [index] * len(new)
        record["bad_row"] += [reason] * len(new)
    record["counts"] = [[each.counts.get(name, 0) for name in COUNTS] for each in rows]
    record["overlong"] = [each.overlong for each in rows]
    return to_table(rows, features, kind.labels, **record)


def _to_rows(
    examples: Sequence[Mapping[str, Any]],
    indices: Sequence[int],
    kind: ExampleKind[Settings],
    reader: Reader,
    settings: Settings,
) -> list[list[PreparedRow] | BadRowError]:
    """Return the rows of each example, or why it cannot be trained."""

    def of_one(example: Mapping[str, Any], index: int) -> list[PreparedRow] | BadRowError:
        try:
            return kind.to_rows(example, index, reader, settings)
        except BadRowError as error:
            return error

    return map_while_tokenizing(of_one, examples, indices)


# Streams -------------------------------------------------------------------------------------------------------------


def _prepare_stream(
    dataset: IterableDataset, prepare_batch: _StreamPreparation[Settings], capacity: int | None
) -> IterableDataset:
    """
    Return a stream of examples as a stream of rows, which hold their images, encoded.

    Workers, ranks and a resumed run see the same rows, since they depend only on what comes next in the stream: every
    `PACKING_BUFFER` rows are packed together.
    """
    rows = in_one_column(dataset).map(
        prepare_batch, with_indices=True, batched=True, batch_size=_STREAMED_AT_ONCE, remove_columns=[EXAMPLE]
    )
    if capacity is None:
        return rows
    return rows.map(_pack_batch, batched=True, batch_size=PACKING_BUFFER, fn_kwargs={"max_row_tokens": capacity})


def _pack_batch(batch: Mapping[str, Sequence[Any]], max_row_tokens: int) -> dict[str, list[Any]]:
    rows = [Row.from_columns(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    packed = list(map(PreparedRow, pack_rows(rows, max_row_tokens)))
    return to_columns(packed, has_images=has_image_columns(batch))


class _StreamPreparation(Generic[Settings]):
    """Prepares batches of a stream, and logs what is lost."""

    def __init__(
        self,
        kind: ExampleKind[Settings],
        reader: PreTrainedTokenizerBase | ProcessorMixin,
        settings: Settings,
        bad_rows: BadRows,
        name: str,
        capacity: int | None,
    ) -> None:
        self._kind, self._reader, self._settings, self._name = kind, reader, settings, name
        self._keeps_columns = capacity is None
        self._bad_rows, self._log = StreamedBadRows(bad_rows, name), StreamLog(name)
        self._so_far = Report(kind.name, settings.bound)  # only sums: a stream may have no end

    def __call__(
        self, batch: Mapping[str, Sequence[Mapping[str, Any]]], indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        rows: list[PreparedRow] = []
        of_example: list[Mapping[str, Any]] = []
        examples = batch[EXAMPLE]
        of_examples = _to_rows(examples, indices, self._kind, self._reader, self._settings)
        for example, index, new in zip(examples, indices, of_examples, strict=True):
            if isinstance(new, BadRowError):
                self._bad_rows.add(index, example, new)
                continue
            rows += new
            of_example += [example] * len(new)
        self._so_far = self._so_far.with_rows(rows)
        self._log.update(self._so_far["num_cut_turns"] + self._so_far["num_dropped_turns"], self._so_far)
        kept = [row for row in rows if len(row)]
        columns = to_columns(kept, self._kind.labels, has_images=isinstance(self._reader, ProcessorMixin))
        if not self._keeps_columns:
            return columns
        examples = list(compress(of_example, map(len, rows)))
        return {**columns, **kept_values(examples, reserved=self._kind.reserved, name=self._name)}
