"""Prepare streams: from conversations to rows on the fly, counting what is lost as it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..trees.rows import ROW_COLUMNS, Row
from .arrow import image_columns
from .bad_rows import BadRowError, BadRows, StreamedBadRows
from .conversations import COUNT_COLUMNS, IMAGE_COUNT_COLUMNS, example_to_rows
from .dataset_format import EXAMPLE, in_one_column
from .kept_columns import kept_values
from .packed_dataset import pack_rows
from .report import PreparationReport
from .settings import RowSettings
from .stream_log import StreamLog


# Conversations that are packed together. More of them fill rows better; fewer start sooner and resume faster.
PACKING_BUFFER = 512
_PREPARED_AT_ONCE = 8


def stream_rows(
    dataset: IterableDataset,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    settings: RowSettings,
    *,
    packing: bool = False,
    bad_rows: BadRows = BadRows.ERROR,
    name: str = "train",
) -> IterableDataset:
    """
    Return a stream of conversations as a stream of rows.

    Workers, ranks and a resumed run see the same rows, since rows depend only on what comes next in the stream: with
    packing, every `PACKING_BUFFER` conversations are packed together. A bad row stops the stream when it comes, unless
    bad rows are dropped. Arguments are those of [`prepare_dataset`].

    Rows have `ROW_COLUMNS`, and `IMAGE_COLUMNS` if a processor reads them: they hold the images, encoded. Without
    packing, they keep the columns of their conversations.
    """
    rows = in_one_column(dataset).map(
        _StreamPreparation(tokenizer, settings, bad_rows, name, keeps_columns=not packing),
        with_indices=True,
        batched=True,
        batch_size=_PREPARED_AT_ONCE,
        remove_columns=[EXAMPLE],
    )
    if not packing:
        return rows
    assert settings.max_row_tokens is not None, "packing needs the capacity of a row"
    return rows.map(
        _pack_batch,
        batched=True,
        batch_size=PACKING_BUFFER,
        fn_kwargs={"max_row_tokens": settings.max_row_tokens},
    )


class _StreamPreparation:
    """Prepares batches of a stream, and logs what is lost."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        settings: RowSettings,
        bad_rows: BadRows,
        name: str,
        *,
        keeps_columns: bool,
    ) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._name, self._keeps_columns = name, keeps_columns
        self._has_images = isinstance(tokenizer, ProcessorMixin)
        self._bad_rows = StreamedBadRows(bad_rows, name)
        self._so_far: PreparationReport | None = None
        self._log = StreamLog(name)

    def __call__(
        self, batch: Mapping[str, Sequence[Mapping[str, object]]], indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        prepared: list[tuple[Row, dict[str, int]]] = []
        of_example: list[Mapping[str, object]] = []
        for example, index in zip(batch[EXAMPLE], indices, strict=True):
            try:
                rows, counts = example_to_rows(example, index, self._tokenizer, self._settings)
            except BadRowError as error:
                self._bad_rows.add(index, example, error)
                continue
            prepared += zip(rows, counts, strict=True)
            of_example += [example] * len(rows)
        if prepared:
            self._count(prepared)
        columns = _to_columns([row for row, _ in prepared if len(row)], self._has_images)
        if not self._keeps_columns:
            return columns
        kept = [example for (row, _), example in zip(prepared, of_example, strict=True) if len(row)]
        return {**columns, **kept_values(kept, name=self._name)}

    def _count(self, prepared: Sequence[tuple[Row, dict[str, int]]]) -> None:
        # Only sums are kept: a stream may have no end.
        columns = (*COUNT_COLUMNS, *IMAGE_COUNT_COLUMNS) if self._has_images else COUNT_COLUMNS
        counts = {column: [counts[column] for _, counts in prepared] for column in columns}
        report = PreparationReport.from_counts(counts, [len(row) for row, _ in prepared], self._settings.bound)
        self._so_far = report if self._so_far is None else self._so_far + report
        self._log.update(self._so_far.num_cut_turns + self._so_far.num_dropped_turns, self._so_far)


def _pack_batch(batch: Mapping[str, Sequence[Any]], max_row_tokens: int) -> dict[str, list[Any]]:
    rows = [Row.from_columns(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    return _to_columns(pack_rows(rows, max_row_tokens), "image_features" in batch)


def _to_columns(rows: Sequence[Row], has_images: bool) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in ROW_COLUMNS}
    return {**columns, **image_columns(rows)} if has_images else columns
