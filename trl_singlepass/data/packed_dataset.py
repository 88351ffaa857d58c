"""Pack prepared datasets, streaming from disk to disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from ..trees.image_features import FeatureNumbers, ImageReference, to_keys
from ..trees.rows import Row
from ..trees.sharing import join_with_shared_prefixes, shareable_length
from .arrow import ROWS_VERSION, has_image_columns, read_images, read_list, read_row, row_features, to_table
from .packing import assign_to_rows
from .rows import PreparedRow


def pack_dataset(rows: Dataset, max_row_tokens: int, *, num_proc: int | None = None, name: str = "train") -> Dataset:
    """
    Return a dataset with fewer, fuller rows, in which conversations share the prefixes that they have in common.

    Both steps are cached by `datasets`: the row of each conversation (only its first tokens are read, from disk) and
    the packed rows (only those that are being joined are in memory).

    `rows` are prepared, none longer than `max_row_tokens`, without an indices mapping. Empty ones are left out.
    """
    fingerprint = Hasher.hash(("packing", ROWS_VERSION, rows._fingerprint, max_row_tokens))
    assigned = rows.with_format("arrow").map(
        _assign_table,
        batched=True,
        batch_size=None,
        fn_kwargs={"max_row_tokens": max_row_tokens},
        remove_columns=rows.column_names,
        features=Features({"members": List(Value("int64"))}),
        new_fingerprint=Hasher.hash((fingerprint, "placed")),
        desc=f"Assigning conversations of {name} dataset to rows",
    )
    features = row_features(has_images=has_image_columns(rows.column_names))
    return assigned.with_format(None).map(
        _join_batch,
        batched=True,
        batch_size=4,
        fn_kwargs={"rows": rows, "features": features},
        remove_columns=assigned.column_names,
        features=features,
        num_proc=min(num_proc or 1, len(assigned)) if num_proc else None,
        new_fingerprint=Hasher.hash((fingerprint, "packed")),
        desc=f"Packing {name} dataset",
    )


def _assign_table(table: pa.Table, max_row_tokens: int) -> pa.Table:
    input_ids, labels, subtree_end = (table[name] for name in ("input_ids", "labels", "subtree_end"))
    lengths = table["num_tokens"].to_numpy()
    shareable = [shareable_length(read_list(labels, i), read_list(subtree_end, i)) for i in range(len(lengths))]
    keys = _PrefixKeys()

    def prefix(i: int) -> NDArray[np.integer]:
        tokens = read_list(input_ids, i)[: shareable[i]]
        if not has_image_columns(table.column_names):
            return tokens
        return keys(tokens, read_list(table["image_features"], i)[: shareable[i]], read_images(table, i))

    members = assign_to_rows(lengths, prefix, max_row_tokens)
    return pa.table({"members": pa.array(members, pa.list_(pa.int64()))})


class _PrefixKeys:
    """What prefixes of rows are compared by: their tokens, and the images that these show by their content."""

    def __init__(self) -> None:
        self._numbers = FeatureNumbers()

    def __call__(
        self, tokens: NDArray[np.integer], features: NDArray[np.integer], images: Sequence[ImageReference]
    ) -> NDArray[np.int64]:
        return to_keys(tokens.astype(np.int64), self._numbers.renumber(features.astype(np.int64), images))


def pack_rows(rows: Sequence[Row], max_row_tokens: int) -> list[Row]:
    """Return rows packed into fewer, fuller ones, as [`pack_dataset`] does."""
    return [join_with_shared_prefixes([rows[i] for i in members]) for members in assign(rows, max_row_tokens)]


def assign(rows: Sequence[Row], max_row_tokens: int) -> list[list[int]]:
    """Return the numbers of the rows that share each packed row; arguments as for [`pack_rows`]."""
    shareable = [shareable_length(row.labels, row.subtree_end) for row in rows]
    keys = _PrefixKeys()

    def prefix(i: int) -> NDArray[np.integer]:
        row = rows[i]
        return keys(row.input_ids[: shareable[i]], row.all_image_features()[: shareable[i]], row.images)

    return assign_to_rows([len(row) for row in rows], prefix, max_row_tokens)


def _join_batch(batch: Mapping[str, list[list[int]]], rows: Dataset, features: Features) -> pa.Table:
    table = rows.data.table
    packed = [join_with_shared_prefixes([read_row(table, i) for i in members]) for members in batch["members"]]
    return to_table(list(map(PreparedRow, packed)), features)
