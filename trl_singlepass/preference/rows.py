"""A pair as one row: the prefix tree of all its turns, and where each trajectory's targets are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Features, List, Value
from numpy.typing import NDArray

from ..data.arrow import image_columns, row_features
from ..trees.prefix_tree import PrefixTree, sample_paths
from ..trees.rows import IMAGE_COLUMNS, ROW_COLUMNS, Row
from ..trees.sample import Sample
from .pairs import SIDES, Pair


# Part of the fingerprint under which rows are cached: raise it when the same pairs become other rows.
PAIR_ROWS_VERSION = 4

POSITION_COLUMNS = tuple(f"{side}_positions" for side in SIDES)
LENGTH_COLUMNS = tuple(f"{side}_turn_lengths" for side in SIDES)
PAIR_COLUMNS = (*ROW_COLUMNS, *POSITION_COLUMNS, *LENGTH_COLUMNS)


def pair_to_columns(pair: Pair, *, has_images: bool = False) -> dict[str, Any]:
    """
    Return a pair as the columns of a dataset.

    A target is named by the position that predicts it. Prompt `[1, 2]`, chosen `[3]`, rejected `[4, 5]`:

        position             0     1     2     3     4     5
        input_ids            1     2     4     5     2     3
        labels            -100  -100     4     5  -100     3

    The chosen trajectory's only target is predicted at position 4, those of the rejected one at 1 and 2.

    Neither trajectory may be empty; `has_images` says whether other pairs of the dataset may have images. Returns
    `ROW_COLUMNS`, with images also `IMAGE_COLUMNS`; for each trajectory, the positions that predict its trained
    tokens, turn by turn, and the number of trained tokens of each turn.
    """
    tree = PrefixTree.from_samples(pair.samples)
    columns = _row_columns(Row.from_tree(tree), has_images=has_images)
    for side, positions_column, lengths_column in zip(pair.sides, POSITION_COLUMNS, LENGTH_COLUMNS, strict=True):
        positions = target_positions(tree, side.samples)
        columns[positions_column] = np.concatenate(positions)
        columns[lengths_column] = np.array(list(map(len, positions)))
    return columns


def no_pair(*, has_images: bool = False) -> dict[str, Any]:
    """Return the columns of a pair of which nothing is left, in the types of [`pair_to_columns`]."""
    row = Row.from_columns(dict.fromkeys(ROW_COLUMNS, ()))
    empty = np.empty(0, np.int64)
    return {**_row_columns(row, has_images=has_images), **dict.fromkeys((*POSITION_COLUMNS, *LENGTH_COLUMNS), empty)}


def _row_columns(row: Row, *, has_images: bool) -> dict[str, Any]:
    columns = {name: getattr(row, name) for name in ROW_COLUMNS}
    if not has_images and row.image_features is None:
        return columns
    return {**columns, **{name: values[0] for name, values in image_columns([row]).items()}}


def target_positions(tree: PrefixTree, samples: Sequence[Sample]) -> list[NDArray[np.int64]]:
    """Return, for each sample of a tree, the positions that predict its trained tokens."""
    positions = []
    for sample, path in zip(samples, sample_paths(tree, samples), strict=True):
        trained = np.flatnonzero(sample.loss_weights)
        predicting = path[trained - 1]
        assert np.array_equal(tree.labels[predicting + 1], sample.token_ids[trained]), "every target has its place"
        positions.append(predicting)
    return positions


def pair_features(counts: Sequence[str] = (), *, has_images: bool = False) -> Features:
    """
    Return the dataset features of pairs: `PAIR_COLUMNS`, `IMAGE_COLUMNS` if there are images, and `counts`, each one
    integer per pair.
    """
    rows = row_features(has_images=has_images)
    names = (*ROW_COLUMNS, *IMAGE_COLUMNS) if has_images else ROW_COLUMNS
    integers = {name: List(Value("int32")) for name in (*POSITION_COLUMNS, *LENGTH_COLUMNS)}
    return Features({**{name: rows[name] for name in names}, **integers, **dict.fromkeys(counts, Value("int64"))})
