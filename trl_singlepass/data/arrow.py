"""Rows in Arrow tables: written in narrow columns, read without copying the table."""

from __future__ import annotations

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
            Names of further columns, each with one integer per row.

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
            Rows, some of which may be empty.
        counts (`Sequence[Mapping[str, int]]`):
            Further columns of each row.
        features (`datasets.Features`):
            Features that [`row_features`] made.

    Returns:
        `pyarrow.Table`: The table.
    """
    columns: dict[str, list[NDArray[np.generic]] | list[int]] = {
        name: [getattr(row, name).astype(dtype) for row in rows] for name, dtype in _DTYPES.items()
    }
    columns["num_tokens"] = [len(row) for row in rows]
    columns["num_pairs"] = [num_attention_pairs(row) for row in rows]
    for name in features.keys() - columns.keys():
        columns[name] = [count[name] for count in counts]
    return pa.table(columns, schema=features.arrow_schema)


def num_attention_pairs(row: Row) -> int:
    """Return how many pairs of a token and an ancestor, or the token itself, a row has: what attention computes."""
    return int((row.subtree_end - np.arange(len(row))).sum())


def read_list(column: pa.ChunkedArray, index: int) -> NDArray[Any]:
    """Return one list of a column of lists without copying it."""
    values: NDArray[Any] = column[index].values.to_numpy(zero_copy_only=True)
    return values


def read_row(table: pa.Table, index: int) -> Row:
    """Return one row of a table with `ROW_COLUMNS`."""
    return Row.from_columns({name: read_list(table[name], index) for name in ROW_COLUMNS})
