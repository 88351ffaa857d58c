"""Rows in Arrow tables: narrow columns to write, and rows read without copying the table."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value
from numpy.typing import NDArray

from ..trees.rows import ROW_COLUMNS, Row


# Part of the fingerprint under which rows are cached: raise it when the same conversations become other rows.
ROWS_VERSION = 4

COST_COLUMNS = ("num_tokens", "num_pairs")
_DTYPES = {name: "float32" if name == "loss_weights" else "int32" for name in ROW_COLUMNS}


def row_features(counts: Sequence[str] = ()) -> Features:
    """
    Return the dataset features of rows.

    Args:
        counts (`Sequence[str]`, *optional*):
            Names of further columns, one integer per row.

    Returns:
        `datasets.Features`: `ROW_COLUMNS`, `COST_COLUMNS` and the counts.
    """
    arrays = {name: List(Value(dtype)) for name, dtype in _DTYPES.items()}
    return Features({**arrays, **{name: Value("int64") for name in (*COST_COLUMNS, *counts)}})


def rows_to_table(rows: Sequence[Row], counts: Sequence[Mapping[str, int]], features: Features) -> pa.Table:
    """
    Return rows as an Arrow table.

    Args:
        rows (`Sequence[Row]`):
            Rows, possibly empty ones.
        counts (`Sequence[Mapping[str, int]]`):
            For each row, its further columns.
        features (`datasets.Features`):
            Features that [`row_features`] made.

    Returns:
        `pyarrow.Table`: The table.
    """
    columns: dict[str, Any] = {name: _lists([getattr(row, name) for row in rows], _DTYPES[name]) for name in _DTYPES}
    columns["num_tokens"] = pa.array([len(row) for row in rows], pa.int64())
    columns["num_pairs"] = pa.array([num_attention_pairs(row) for row in rows], pa.int64())
    for name in features:
        if name not in columns:
            columns[name] = pa.array([count[name] for count in counts], pa.int64())
    return pa.table(columns, schema=features.arrow_schema)


def num_attention_pairs(row: Row) -> int:
    """Return how many pairs of a token and an ancestor, or the token itself, a row has: what attention computes."""
    return int((row.subtree_end - np.arange(len(row))).sum())


def _lists(arrays: list[NDArray[Any]], dtype: str) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, arrays)]).astype(np.int32)
    values = np.concatenate(arrays) if arrays else np.empty(0)
    return pa.ListArray.from_arrays(offsets, pa.array(values.astype(dtype, copy=False)))


class ListColumn:
    """
    Column of lists of an Arrow table, read one list at a time without copying.

    Args:
        column (`pyarrow.ChunkedArray`):
            Column, in memory or memory-mapped.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._starts = np.cumsum([0] + [len(chunk) for chunk in chunks]).tolist()
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]

    def __call__(self, index: int) -> NDArray[Any]:
        """Return one list."""
        chunk = bisect_right(self._starts, index) - 1
        offsets, local = self._offsets[chunk], index - self._starts[chunk]
        values: NDArray[Any] = self._values[chunk][offsets[local] : offsets[local + 1]]
        return values


class RowReader:
    """
    Rows of an Arrow table, read one at a time without copying the table.

    Args:
        table (`pyarrow.Table`):
            Table with `ROW_COLUMNS`.
    """

    def __init__(self, table: pa.Table) -> None:
        self._columns = {name: ListColumn(table[name]) for name in ROW_COLUMNS}

    def __call__(self, index: int) -> Row:
        """Return one row."""
        return Row.from_columns({name: column(index) for name, column in self._columns.items()})
