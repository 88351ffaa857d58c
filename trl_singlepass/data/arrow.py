"""Rows as the columns of a dataset: written narrow, read without copying the table, beside those of their examples."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value, concatenate_datasets
from numpy.typing import NDArray
from transformers.utils.logging import get_logger

from ..trees.image_features import ImageReference
from ..trees.rows import IMAGE_COLUMNS, ROW_COLUMNS, Row
from .images import with_images_named
from .rows import PreparedRow


logger = get_logger(__name__)

# Part of the fingerprint under which rows are cached: raise it when the same examples become other rows.
ROWS_VERSION = 8

COST_COLUMNS = ("num_tokens", "num_pairs")
_DTYPES = dict.fromkeys(ROW_COLUMNS, "int32") | {
    "token_weights": "float32",
    **dict.fromkeys(("token_parts", "multiplicity"), "uint16"),  # 21,844 turns, 65,535 samples through one token
}
_SOURCE = {
    **{name: Value("string") for name in ("dataset", "path")},
    **{name: Value("int64") for name in ("row", "index")},
    "bytes": Value("binary"),
}
_IMAGE = {"content": Value("string"), "num_features": Value("int32"), "source": _SOURCE, "in_company": Value("bool")}
IMAGE_FEATURES = Features({"image_features": List(Value("int32")), "image_references": List(_IMAGE)})
"""Dataset features of `IMAGE_COLUMNS`."""


def position_column(label: str) -> str:
    """Return the name of the column with the positions that predict the trained tokens of a list, turn by turn."""
    return f"{label}_positions"


def length_column(label: str) -> str:
    """Return the name of the column with the number of trained tokens of each turn of a list."""
    return f"{label}_turn_lengths"


def row_columns(labels: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of the columns of rows with lists of these labels, without those of images and costs."""
    return (*ROW_COLUMNS, *map(position_column, labels), *map(length_column, labels))


def row_features(labels: Sequence[str] = (), *, has_images: bool = False) -> Features:
    """Return the dataset features of rows; those of labelled lists are not balanced among ranks, and have no costs."""
    arrays = {name: List(Value(dtype)) for name, dtype in _DTYPES.items()}
    further = {name: List(Value("int32")) for name in row_columns(labels)[len(ROW_COLUMNS) :]}
    costs = {} if labels else {name: Value("int64") for name in COST_COLUMNS}
    return Features({**arrays, **(IMAGE_FEATURES if has_images else {}), **further, **costs})


def to_columns(rows: Sequence[PreparedRow], labels: Sequence[str] = (), *, has_images: bool) -> dict[str, list[Any]]:
    """Return rows as columns, those of images among them if the dataset has any."""
    of_rows = [each.row.columns() for each in rows]
    columns: dict[str, list[Any]] = {name: [of_row[name] for of_row in of_rows] for name in ROW_COLUMNS}
    if has_images:
        columns["image_features"] = [each.row.all_image_features().astype("int32") for each in rows]
        columns["image_references"] = [of_row.get("image_references", []) for of_row in of_rows]
    for label in labels:
        targets = [each.targets.get(label, ()) for each in rows]
        columns[position_column(label)] = [np.concatenate([np.empty(0, np.int64), *turns]) for turns in targets]
        columns[length_column(label)] = [np.array([len(turn) for turn in turns], np.int64) for turns in targets]
    return {name: columns[name] for name in (*row_columns(labels), *columns)}


def to_table(rows: Sequence[PreparedRow], features: Features, labels: Sequence[str] = (), **further: Any) -> pa.Table:
    """Return rows, some of which may be empty, as an Arrow table of `features`; `further` are other columns of it."""
    columns = to_columns(rows, labels, has_images="image_references" in features)
    further |= {name: _to_lists(columns[name], features[name].feature.dtype) for name in row_columns(labels)}
    if not labels:
        columns["num_tokens"] = list(map(len, rows))
        columns["num_pairs"] = [num_attention_pairs(each.row) for each in rows]
    return pa.table(columns | further, schema=features.arrow_schema)


def _to_lists(arrays: Sequence[NDArray[Any]], dtype: str) -> pa.ListArray:
    """Return arrays as Arrow lists of narrower values; Arrow itself would narrow and copy them value by value."""
    values = np.concatenate([np.empty(0, dtype), *arrays])
    if values.dtype.kind == "i" and len(values) and values.max() > np.iinfo(dtype).max:
        raise ValueError(
            f"A row holds the number {values.max()} in a column of numbers up to {np.iinfo(dtype).max}. It has too "
            "many turns, or too many of its samples begin alike: split it into several."
        )
    values = values.astype(dtype)
    return pa.ListArray.from_arrays(np.cumsum([0, *map(len, arrays)], dtype=np.int32), values)


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


# Columns of examples -------------------------------------------------------------------------------------------------


def keep_columns(
    rows: Dataset, examples: Dataset, of_example: NDArray[np.int64], *, reserved: Collection[str] = (), name: str
) -> Dataset:
    """
    Return rows with the columns of the examples that they were made of, as TRL's prepared datasets have them.

    They are for callbacks and other readers; no model gets them. Nothing is copied where there is one row per example,
    and the examples stand in their files in their order. Otherwise, `datasets` writes the columns once more and caches
    them.

    `rows` has no indices mapping. `of_example`, `(num_rows,)`, int64, is the position of each row's example. The
    columns of examples may not have `reserved` names, beside those of rows.
    """
    names = _kept(examples.column_names, reserved, name)
    if not names or not len(rows):
        return rows
    kept = examples.with_format(None).select_columns(list(names)).rename_columns(names)
    if not np.array_equal(of_example, np.arange(len(examples))):
        kept = kept.select(of_example)
    if kept._indices is not None:
        kept = kept.flatten_indices()
    joined = concatenate_datasets([rows.with_format(None), kept], axis=1)
    return joined.with_format(rows.format["type"], **rows.format["format_kwargs"])


def kept_values(
    examples: Sequence[Mapping[str, object]], *, reserved: Collection[str] = (), name: str
) -> dict[str, list[object]]:
    """Return the columns that rows of a stream keep of their examples; where one lacks a column, it holds `None`."""
    names = _kept(dict.fromkeys(column for example in examples for column in example), reserved, name)
    return {shown: [example.get(column) for example in examples] for column, shown in names.items()}


def _kept(columns: Iterable[str], reserved: Collection[str], name: str) -> dict[str, str]:
    """Return the name that each column that is kept has among those of rows, and log which are not kept."""
    shown = dict(zip(columns, with_images_named(dict.fromkeys(columns)), strict=True))
    replaced = sorted({*ROW_COLUMNS, *IMAGE_COLUMNS, *COST_COLUMNS, *reserved} & set(shown.values()))
    if replaced:
        logger.warning_once(
            f"The prepared {name} dataset lacks the columns {replaced} that were given: columns of rows have these "
            "names. Rename them to keep them."
        )
    return {column: each for column, each in shown.items() if each not in replaced}
