"""Pieces of a row and the ranges of keys on their paths: the examples of the docstrings."""

import numpy as np
import pytest

from support.tree_masks import row_of_ten
from trl_singlepass.attention.key_ranges import Pieces, concatenated_ranges, group_pieces, key_ranges
from trl_singlepass.trees.rows import Run, TreePlan


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


def groups_of(forks, history, cost_of_shared, branch=50):
    """Groups of branches of 50 tokens each, after some tokens of a history; the history is a piece of its own."""
    runs = [Run(0, history, 0, ())]
    for fork in forks:
        runs.append(Run(runs[-1].end, runs[-1].end + branch, fork, ((0, fork),)))
    plan = TreePlan(runs[-1].end, tuple(runs))
    pieces = Pieces.from_plan(plan)
    ranges = key_ranges(plan, pieces, pieces.depth * 0, before=pieces.end)
    num_keys = np.bincount(ranges.piece, ranges.end - ranges.start).astype(np.int64)
    return group_pieces(pieces, ranges, num_keys, cost_of_shared)


def test_the_documented_history():
    groups = groups_of(range(800, 0, -100), 900, 1.0)
    assert groups.first.tolist() == [0, 1, 5, 8]
    assert groups.num_shared.tolist() == [0, 500, 200, 100]
    assert groups.of_pieces(9).tolist() == [0, 500, 500, 500, 500, 200, 200, 200, 100]


def test_all_branches_of_one_fork_share_all_of_it():
    groups = groups_of([300] * 10, 400, 1.0)
    assert groups.first.tolist() == [0, 1]
    assert groups.num_shared.tolist() == [0, 300]


def test_cheaper_shared_keys_make_smaller_groups():
    forks = range(9900, 0, -100)
    assert len(groups_of(forks, 10_000, 0.25).first) > len(groups_of(forks, 10_000, 1.0).first)


def test_keys_grow_with_the_square_root_of_branches():
    """Whole paths grow with their number: of 100 and 400 branches, 50 and 200 histories."""
    for count, histories in ((100, 13), (400, 26)):
        forks = list(range(100 * count, 0, -100))
        groups = groups_of(forks, forks[0] + 1, 1.0)
        gathered = groups.num_shared.sum() + sum(forks) - groups.of_pieces(count + 1).sum()
        assert gathered < histories * forks[0]
