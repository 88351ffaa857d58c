"""Prepare datasets of pairs: from messages to rows, cached, in several processes, or as a stream."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.bad_rows import BadRowError, BadRows, StreamedBadRows, bad_rows_error, get_reason, group_errors
from ..data.dataset_format import EXAMPLE, in_one_column
from ..data.images import undecoded
from ..data.kept_columns import keep_columns, kept_values
from ..data.preparation import say, tokenizer_fingerprint
from ..data.stream_log import StreamLog
from ..data.vision import ConversationReader, reader_for
from ..images.loading import image_loader_of
from ..images.placeholders import placeholders_of
from ..trees.prefix_tree import PrefixTree
from ..trees.rows import IMAGE_COLUMNS
from ..trees.splitting import split_samples
from .collator import REFERENCE_COLUMNS
from .pairs import SIDES, Tokenizer, example_to_pair, images_name, images_of_trajectory
from .report import COUNT_COLUMNS, PairReport, count_pair
from .rows import PAIR_COLUMNS, PAIR_ROWS_VERSION, no_pair, pair_features, pair_to_columns
from .settings import PairSettings


_REASON = "bad_row"  # column with the reason why an example cannot be trained
_RESERVED = (*PAIR_COLUMNS, *REFERENCE_COLUMNS)
_PREPARED_AT_ONCE = 8


def prepare_pairs(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    settings: PairSettings,
    *,
    bad_rows: BadRows = BadRows.ERROR,
    num_proc: int | None = None,
    name: str = "train",
    is_main_process: bool = True,
) -> Dataset | IterableDataset:
    """
    Return a dataset of pairs as a dataset of rows, one per pair, and say what it held and what is lost.

    Pairs have any of the forms of [`example_to_pair`]; rows have `PAIR_COLUMNS` and the columns of their pairs (see
    [`keep_columns`]). A stream is prepared on the fly. `name` is what progress bars and the log call the dataset; the
    main process prints the summary.

    If examples cannot be rendered without losing part of a turn, and may not be left out, this raises
    `RenderingError`; if no pair is left, `ValueError`.
    """
    tokenizer = reader_for(dataset, tokenizer)
    if isinstance(dataset, IterableDataset):
        return in_one_column(dataset).map(
            _StreamPreparation(tokenizer, settings, bad_rows, name),
            with_indices=True,
            batched=True,
            batch_size=_PREPARED_AT_ONCE,
            remove_columns=[EXAMPLE],
        )
    state = ("pairs", PAIR_ROWS_VERSION, dataset._fingerprint, tokenizer_fingerprint(tokenizer), repr(settings))
    loader, reader = image_loader_of(tokenizer), tokenizer
    if loader is not None:
        reader = ConversationReader(placeholders_of(tokenizer), dataset._fingerprint)
        for side in SIDES:
            of_side = partial(images_of_trajectory, undecoded(dataset), side)
            loader.add_dataset(images_name(dataset._fingerprint, side), of_side)
    rows = undecoded(dataset).map(
        _prepare_example,
        with_indices=True,
        fn_kwargs={"tokenizer": reader, "settings": settings},
        remove_columns=dataset.column_names,
        features=Features({**pair_features(COUNT_COLUMNS, has_images=loader is not None), _REASON: Value("string")}),
        num_proc=num_proc,
        new_fingerprint=Hasher.hash(state),
        desc=f"Building prefix trees of {name} dataset",
    )
    report = _get_report(rows, bad_rows, name, settings)
    if report.counts["num_tokens"] == 0:
        raise ValueError(
            f"No pair of the {name} dataset is trained: {report}. Raise {report.bound}, or set it to None."
        )
    if is_main_process:
        say(f"{name} dataset: {report}.", logging.INFO if report.is_complete else logging.WARNING)
    lengths = rows.data.table["num_tokens"].to_numpy()
    rows = rows.remove_columns([*COUNT_COLUMNS, _REASON])
    rows = keep_columns(rows, dataset, reserved=_RESERVED, name=name).select(np.flatnonzero(lengths))
    rows.info.description = str(report)
    return rows


def _get_report(rows: Dataset, bad_rows: BadRows, name: str, settings: PairSettings) -> PairReport:
    table = rows.data.table
    bad = [(index, reason) for index, reason in enumerate(table[_REASON].to_pylist()) if reason is not None]
    errors = group_errors(bad)
    if errors and bad_rows == BadRows.ERROR:
        raise bad_rows_error(errors, len(rows), name)
    columns = {column: table[column].to_pylist() for column in COUNT_COLUMNS}
    return PairReport.from_columns(columns, settings, errors)


def _prepare_example(
    example: Mapping[str, Any], index: int, tokenizer: Tokenizer, settings: PairSettings
) -> dict[str, Any]:
    try:
        columns, counts = _example_to_columns(example, index, tokenizer, settings)
    except BadRowError as error:
        empty = no_pair(has_images=_reads_images(tokenizer))
        return {**empty, **dict.fromkeys(COUNT_COLUMNS, 0), _REASON: get_reason(error, index)}
    return {**columns, **counts, _REASON: None}


def _example_to_columns(
    example: Mapping[str, Any], index: int, tokenizer: Tokenizer, settings: PairSettings
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the row of one example, empty if a side is too long to keep any of it, and its counts."""
    pair = example_to_pair(example, index, tokenizer, settings)
    if not all(side.samples for side in pair.sides):
        return no_pair(has_images=_reads_images(tokenizer)), count_pair(pair, num_tokens=0)
    columns = pair_to_columns(pair, has_images=_reads_images(tokenizer))
    parts = split_samples(pair.samples, settings.max_row_tokens)
    num_tokens = len(columns["input_ids"])
    if len(parts) > 1:
        num_tokens = sum(len(PrefixTree.from_samples(part)) for part in parts)
    return columns, count_pair(pair, num_tokens, num_rows=len(parts))


def _reads_images(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer, ProcessorMixin | ConversationReader)


class _StreamPreparation:
    """Prepares batches of a stream, and logs what is lost."""

    def __init__(self, tokenizer: Tokenizer, settings: PairSettings, bad_rows: BadRows, name: str) -> None:
        self._tokenizer, self._settings, self._name = tokenizer, settings, name
        self._bad_rows = StreamedBadRows(bad_rows, name)
        self._so_far: PairReport | None = None
        self._log = StreamLog(name)

    def __call__(
        self, batch: Mapping[str, Sequence[Mapping[str, Any]]], indices: Sequence[int]
    ) -> dict[str, list[Any]]:
        prepared: list[tuple[dict[str, Any], dict[str, int]]] = []
        pairs: list[Mapping[str, Any]] = []
        for example, index in zip(batch[EXAMPLE], indices, strict=True):
            try:
                prepared.append(_example_to_columns(example, index, self._tokenizer, self._settings))
                pairs.append(example)
            except BadRowError as error:
                self._bad_rows.add(index, example, error)
        if prepared:
            self._count([counts for _, counts in prepared])
        rows = [columns for columns, counts in prepared if counts["num_tokens"]]
        kept = [pair for pair, (_, counts) in zip(pairs, prepared, strict=True) if counts["num_tokens"]]
        names = (*PAIR_COLUMNS, *IMAGE_COLUMNS) if _reads_images(self._tokenizer) else PAIR_COLUMNS
        columns = {name: [row[name] for row in rows] for name in names}
        return {**columns, **kept_values(kept, reserved=_RESERVED, name=self._name)}

    def _count(self, counts: Sequence[Mapping[str, int]]) -> None:
        # Only sums are kept: a stream may have no end.
        columns = {column: [count[column] for count in counts] for column in COUNT_COLUMNS}
        report = PairReport.from_columns(columns, self._settings)
        self._so_far = report if self._so_far is None else self._so_far + report
        self._log.update(self._so_far.counts["num_cut_tokens"], self._so_far)
