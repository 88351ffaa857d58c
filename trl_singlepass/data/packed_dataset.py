"""Prepared datasets to packed ones, streamed from disk to disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher

from ..trees.rows import Row
from ..trees.sharing import join_with_shared_prefixes, shareable_length
from .arrow import ROWS_VERSION, ListColumn, RowReader, row_features, rows_to_table
from .packing import place
from .report import PackingReport


def pack_dataset(
    rows: Dataset, max_row_tokens: int, *, num_proc: int | None = None, name: str = "train"
) -> tuple[Dataset, PackingReport]:
    """
    Return a dataset of rows as one of fewer, fuller rows, in which conversations that begin alike share what they can.

    Both steps are cached by `datasets`: where each conversation goes (only its beginning is read, from disk) and the
    packed rows (only those that are joined are in memory).

    Args:
        rows (`datasets.Dataset`):
            Prepared rows, none longer than `max_row_tokens`, without an indices mapping; empty rows are left out.
        max_row_tokens (`int`):
            Capacity of a row, in tokens.
        num_proc (`int`, *optional*):
            Number of processes that join rows.
        name (`str`, *optional*, defaults to `"train"`):
            Name of the dataset for the progress bars.

    Returns:
        `tuple[Dataset, PackingReport]`: The packed rows and what packing achieved.
    """
    fingerprint = Hasher.hash(("packing", ROWS_VERSION, rows._fingerprint, max_row_tokens))
    placed = rows.with_format("arrow").map(
        _place_table,
        batched=True,
        batch_size=None,
        fn_kwargs={"max_row_tokens": max_row_tokens},
        remove_columns=rows.column_names,
        features=Features({"members": List(Value("int64"))}),
        new_fingerprint=Hasher.hash((fingerprint, "placed")),
        desc=f"Placing conversations of {name} dataset in rows",
    )
    features = row_features()
    packed = placed.with_format(None).map(
        _Joiner(rows, features),
        batched=True,
        batch_size=4,
        remove_columns=placed.column_names,
        features=features,
        num_proc=min(num_proc or 1, len(placed)) if num_proc else None,
        new_fingerprint=Hasher.hash((fingerprint, "packed")),
        desc=f"Packing {name} dataset",
    )
    return packed, _report(rows, packed, max_row_tokens)


def _report(rows: Dataset, packed: Dataset, max_row_tokens: int) -> PackingReport:
    totals = {name: int(pc.sum(rows.data.table[name]).as_py()) for name in ("num_tokens", "num_sample_tokens")}
    return PackingReport(
        num_rows=len(packed),
        num_row_tokens=int(pc.sum(packed.data.table["num_tokens"]).as_py()),
        max_row_tokens=max_row_tokens,
        num_unpacked_tokens=totals["num_tokens"],
        num_sample_tokens=totals["num_sample_tokens"],
    )


def _place_table(table: pa.Table, max_row_tokens: int) -> pa.Table:
    input_ids, labels, subtree_end = (ListColumn(table[name]) for name in ("input_ids", "labels", "subtree_end"))
    lengths = table["num_tokens"].to_numpy()
    shareable = [shareable_length(labels(i), subtree_end(i)) for i in range(len(lengths))]
    members = place(lengths, lambda i: input_ids(i)[: shareable[i]], max_row_tokens)
    return pa.table({"members": pa.array(members, pa.list_(pa.int64()))})


def pack_rows(rows: Sequence[Row], max_row_tokens: int) -> list[Row]:
    """
    Return rows packed into fewer, fuller ones.

    Args:
        rows (`Sequence[Row]`):
            Rows, none longer than `max_row_tokens`.
        max_row_tokens (`int`):
            Capacity of a row, in tokens.

    Returns:
        `list[Row]`: The packed rows.
    """
    shareable = [shareable_length(row.labels, row.subtree_end) for row in rows]
    members = place([len(row) for row in rows], lambda i: rows[i].input_ids[: shareable[i]], max_row_tokens)
    return [join_with_shared_prefixes([rows[i] for i in of_row]) for of_row in members]


class _Joiner:
    """Joins the rows of a dataset that are named; opens the dataset once per process."""

    def __init__(self, rows: Dataset, features: Features) -> None:
        self._rows, self._features = rows, features
        self._reader: RowReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_rows": self._rows, "_features": self._features, "_reader": None}

    def __call__(self, batch: Mapping[str, list[list[int]]]) -> pa.Table:
        if self._reader is None:
            self._reader = RowReader(self._rows.data.table)
        rows = [join_with_shared_prefixes([self._reader(i) for i in members]) for members in batch["members"]]
        return rows_to_table(rows, [{}] * len(rows), self._features)
