"""Pieces of a row and the ranges of keys on their paths: the examples of the docstrings."""

import numpy as np
import pytest

from support.tree_masks import row_of_ten
from trl_singlepass.attention.key_ranges import Pieces, concatenated_ranges, key_ranges


@pytest.fixture
def plan():
    return row_of_ten().plan


def columns(record):
    return [getattr(record, name).tolist() for name in record.__dataclass_fields__]


@pytest.mark.parametrize(
    ("options", "start", "end", "depth", "run"),
    [
        ({}, [0, 7], [7, 10], [0, 3], [0, 1]),
        ({"size": 4}, [0, 4, 7, 8], [4, 7, 8, 10], [0, 4, 3, 4], [0, 0, 1, 1]),
        ({"size": 4, "by_depth": True}, [0, 4, 7, 8], [4, 7, 8, 10], [0, 4, 3, 4], [0, 0, 1, 1]),
        ({"size": 5}, [0, 5, 7], [5, 7, 10], [0, 5, 3], [0, 0, 1]),
        ({"size": 5, "by_depth": True}, [0, 5, 7, 9], [5, 7, 9, 10], [0, 5, 3, 5], [0, 0, 1, 1]),
    ],
)
def test_pieces(plan, options, start, end, depth, run):
    assert columns(Pieces.from_plan(plan, **options)) == [start, end, depth, run]


@pytest.mark.parametrize(
    ("window", "piece", "start", "end"),
    [(None, [0, 1, 1], [0, 0, 7], [7, 3, 10]), (3, [0, 1, 1], [0, 1, 7], [7, 3, 10])],
)
def test_key_ranges(plan, window, piece, start, end):
    pieces = Pieces.from_plan(plan)
    first_depth = pieces.depth * 0 if window is None else pieces.depth - (window - 1)
    assert columns(key_ranges(plan, pieces, first_depth, before=pieces.end)) == [piece, start, end]


def test_concatenated_ranges():
    assert concatenated_ranges(np.array([4, 0]), np.array([3, 2])).tolist() == [4, 5, 6, 0, 1]
