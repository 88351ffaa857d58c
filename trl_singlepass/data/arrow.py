"""Rows in Arrow tables: written in narrow columns, read without copying the table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value
from numpy.typing import NDArray

from ..trees.image_features import ImageReference
from ..trees.rows import IMAGE_COLUMNS, ROW_COLUMNS, Row


# Part of the fingerprint under which rows are cached: raise it when the same conversations become other rows.
ROWS_VERSION = 5

COST_COLUMNS = ("num_tokens", "num_pairs")
_DTYPES = {name: "float32" if name == "loss_weights" else "int32" for name in ROW_COLUMNS}
_SOURCE = {
    **{name: Value("string") for name in ("dataset", "path")},
    **{name: Value("int64") for name in ("row", "index")},
    "bytes": Value("binary"),
}
_IMAGE = {"content": Value("string"), "num_features": Value("int32"), "source": _SOURCE, "in_company": Value("bool")}
IMAGE_FEATURES = Features({"image_features": List(Value("int32")), "image_references": List(_IMAGE)})
"""Dataset features of `IMAGE_COLUMNS`."""


def row_features(counts: Sequence[str] = (), *, has_images: bool = False) -> Features:
    """
    Return the dataset features of rows: `ROW_COLUMNS`, `IMAGE_COLUMNS` if there are images, `COST_COLUMNS`, and
    `counts`, names of further columns with one integer per row.
    """
    arrays = {name: List(Value(dtype)) for name, dtype in _DTYPES.items()}
    arrays = {**arrays, **IMAGE_FEATURES} if has_images else arrays
    return Features({**arrays, **{name: Value("int64") for name in (*COST_COLUMNS, *counts)}})


def rows_to_table(rows: Sequence[Row], counts: Sequence[Mapping[str, int]], features: Features) -> pa.Table:
    """Return rows, some of which may be empty, as an Arrow table. `counts` are the further columns of each row."""
    columns: dict[str, list[Any]] = {
        name: [getattr(row, name).astype(dtype) for row in rows] for name, dtype in _DTYPES.items()
    }
    if "image_references" in features:
        columns |= image_columns(rows)
    columns["num_tokens"] = [len(row) for row in rows]
    columns["num_pairs"] = [num_attention_pairs(row) for row in rows]
    for name in features.keys() - columns.keys():
        columns[name] = [count[name] for count in counts]
    return pa.table(columns, schema=features.arrow_schema)


def image_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Return `IMAGE_COLUMNS` of rows, some of which may have no images."""
    return {
        "image_features": [row.all_image_features().astype("int32") for row in rows],
        "image_references": [[asdict(image) for image in row.images] for row in rows],
    }


def num_attention_pairs(row: Row) -> int:
    """Return how many pairs of a token and an ancestor, or the token itself, a row has: what attention computes."""
    return int((row.subtree_end - np.arange(len(row))).sum())


def read_list(column: pa.ChunkedArray, index: int) -> NDArray[Any]:
    """Return one list of a column of lists without copying it."""
    values: NDArray[Any] = column[index].values.to_numpy(zero_copy_only=True)
    return values


def read_row(table: pa.Table, index: int) -> Row:
    """Return one row of a table with `ROW_COLUMNS`, and with `IMAGE_COLUMNS` if the dataset has images."""
    columns: dict[str, Any] = {name: read_list(table[name], index) for name in ROW_COLUMNS}
    if has_image_columns(table.column_names):
        columns |= {
            "image_features": read_list(table["image_features"], index),
            "image_references": table["image_references"][index].as_py(),
        }
    return Row.from_columns(columns)


def has_image_columns(columns: Collection[str]) -> bool:
    """Return whether these are the columns of rows of a dataset with images."""
    return set(IMAGE_COLUMNS) <= set(columns)


def read_images(table: pa.Table, index: int) -> list[ImageReference]:
    """Return the images that one row of a table with `IMAGE_COLUMNS` shows."""
    return [ImageReference(**image) for image in table["image_references"][index].as_py()]
