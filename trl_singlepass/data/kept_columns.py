"""The columns that a dataset had: prepared rows keep them for callbacks and other readers, and no model gets them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from transformers.utils.logging import get_logger

from ..trees.rows import IMAGE_COLUMNS, ROW_COLUMNS
from .arrow import COST_COLUMNS
from .images import with_images_named


logger = get_logger(__name__)
_OF_ROWS = (*ROW_COLUMNS, *IMAGE_COLUMNS, *COST_COLUMNS)


def keep_columns(
    rows: Dataset,
    examples: Dataset,
    of_example: NDArray[np.int64] | None = None,
    *,
    reserved: Collection[str] = (),
    name: str = "train",
) -> Dataset:
    """
    Return rows with the columns of the examples that they were made of, as TRL's prepared datasets have them.

    Nothing is copied where there is one row per example, and the examples stand in their files in their order.
    Otherwise, `datasets` writes the columns once more and caches them.

    `rows` has no indices mapping. `of_example`, `(num_rows,)`, int64, is the position of each row's example; by
    default, rows and examples go together one by one. `reserved` are names that the examples' columns may not have,
    beside those of rows.
    """
    names = _kept(examples.column_names, reserved, name)
    if not names or not len(rows):
        return rows
    kept = examples.with_format(None).select_columns(list(names)).rename_columns(names)
    if of_example is not None and not np.array_equal(of_example, np.arange(len(examples))):
        kept = kept.select(of_example)
    if kept._indices is not None:
        kept = kept.flatten_indices()
    joined = concatenate_datasets([rows.with_format(None), kept], axis=1)
    return joined.with_format(rows.format["type"], **rows.format["format_kwargs"])


def kept_values(
    examples: Sequence[Mapping[str, object]], *, reserved: Collection[str] = (), name: str = "train"
) -> dict[str, list[object]]:
    """
    Return the values of the columns that rows keep, for rows of a stream.

    `examples` holds the example of each row; where one lacks a column, its value is `None`.
    """
    names = _kept(dict.fromkeys(column for example in examples for column in example), reserved, name)
    return {shown: [example.get(column) for example in examples] for column, shown in names.items()}


def _kept(columns: Iterable[str], reserved: Collection[str], name: str) -> dict[str, str]:
    """Return the name that each column that is kept has among those of rows, and log which are not kept."""
    shown = dict(zip(columns, with_images_named(dict.fromkeys(columns)), strict=True))
    replaced = sorted({*_OF_ROWS, *reserved} & set(shown.values()))
    if replaced:
        logger.warning_once(
            f"The prepared {name} dataset lacks the columns {replaced} that were given: columns of rows have these "
            "names. Rename them to keep them."
        )
    return {column: each for column, each in shown.items() if each not in replaced}
