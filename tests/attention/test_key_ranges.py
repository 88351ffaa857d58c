"""Pieces of a row and the ranges of keys on their paths: the examples of the docstrings."""

import numpy as np

from trl_singlepass.attention.key_ranges import Pieces, group_pieces, key_ranges
from trl_singlepass.trees.rows import Run, TreePlan


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
