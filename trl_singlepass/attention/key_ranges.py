"""
Which keys a piece of a run can see, for all pieces of a row at once, and which ones neighbours see together (numpy).

The examples of this folder share a row of ten tokens: a history of three, and two branches of four and three.

    position       0  1  2  3  4  5  6  7  8  9
    depth          0  1  2  3  4  5  6  3  4  5
    subtree_end   10 10 10  7  7  7  7 10 10 10
    runs          [0, 7)              [7, 10) with ancestors [0, 3)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..trees.rows import TreePlan


Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Parts of runs that together cover a row in order. Arrays of shape `(num_pieces,)`."""

    start: Ints  # position of the first query
    end: Ints  # just past the last query
    depth: Ints  # depth of the first query
    run: Ints  # index of the run in the plan

    @classmethod
    def from_plan(cls, plan: TreePlan, size: int | None = None, *, by_depth: bool = False) -> Pieces:
        """
        Cut the runs of a row at multiples of `size` tokens, by position or by depth; without a size, nowhere.

        The row above, cut at multiples of 5, has the pieces `[0, 5)`, `[5, 7)` and `[7, 10)`. By depth, the second run
        is cut as well, where it reaches depth 5: `[0, 5)`, `[5, 7)`, `[7, 9)`, `[9, 10)`.
        """
        runs = np.array([(run.start, run.end, run.depth) for run in plan.runs], np.int64).reshape(-1, 3)
        start, end, depth = runs.T
        if size is None:
            return cls(start, end, depth, np.arange(len(runs)))
        first = depth if by_depth else start
        count = (first + end - start - 1) // size - first // size + 1
        run = np.repeat(np.arange(len(runs)), count)
        border = (first // size)[run] * size + _position_in_group(count) * size
        offset = np.maximum(border - first[run], 0)
        length = np.minimum(border + size - first[run], (end - start)[run])
        return cls(start[run] + offset, start[run] + length, depth[run] + offset, run)

    @property
    def last_depth(self) -> Ints:
        """Depth of the last query of each piece."""
        return self.depth + self.end - self.start - 1


@dataclass(frozen=True, slots=True, eq=False)
class KeyRanges:
    """Ranges of keys that pieces see; arrays of shape `(num_ranges,)`, the ranges of a piece together, by depth."""

    piece: Ints  # index of the piece
    start: Ints  # position of the first key
    end: Ints  # just past the last key


def key_ranges(plan: TreePlan, pieces: Pieces, first_depth: Ints, before: Ints) -> KeyRanges:
    """
    Return the keys on the path of each piece, from some depth on and before some position.

    In the row above, with runs as pieces and everything up to the piece's end:

        from depth 0 on            piece 0: [0, 7)    piece 1: [0, 3) [7, 10)
        depth - 2 on (window 3)    piece 0: [0, 7)    piece 1: [1, 3) [7, 10)

    `first_depth` and `before`, the row position just past the last key that may be in it, have shape `(num_pieces,)`.
    Ancestors outside the row, whose positions are those past its end, come before all of its tokens. Empty ranges are
    left out.
    """
    paths = [run.path for run in plan.runs]
    lengths = np.array([len(path) for path in paths], np.int64)
    ranges = np.array([key_range for path in paths for key_range in path], np.int64).reshape(-1, 2)
    sizes = ranges[:, 1] - ranges[:, 0]
    depths = np.cumsum(sizes) - sizes
    offsets = np.cumsum(lengths) - lengths
    depths -= np.repeat(depths[offsets], lengths)
    count = lengths[pieces.run]
    piece = np.repeat(np.arange(len(count)), count)
    chosen = concatenated_ranges(offsets[pieces.run], count)
    start = ranges[chosen, 0] + np.maximum(first_depth[piece] - depths[chosen], 0)
    is_slot = ranges[chosen, 0] >= plan.length
    end = np.where(is_slot, ranges[chosen, 1], np.minimum(ranges[chosen, 1], before[piece]))
    kept = start < end
    return KeyRanges(piece[kept], start[kept], end[kept])


def concatenated_ranges(start: Ints, length: Ints) -> Ints:
    """Return the integers of all ranges in a row: starts 4, 0 and lengths 3, 2 give 4, 5, 6, 0, 1."""
    return np.repeat(start, length) + _position_in_group(length)


def _position_in_group(size: Ints) -> Ints:
    """0, 1, … within each group: sizes 2, 3 give 0, 1, 0, 1, 2."""
    return np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Neighbouring pieces that share the beginnings of their key lists. Arrays of shape `(num_groups,)`."""

    first: Ints  # index of the first piece; the group ends where the next one begins
    num_shared: Ints  # number of keys that all queries of the group see, at the beginning of each piece's list

    def of_pieces(self, num_pieces: int) -> Ints:
        """Return the number of shared keys of each piece, shape `(num_pieces,)`."""
        return np.repeat(self.num_shared, np.diff(np.append(self.first, num_pieces)))


def group_pieces(pieces: Pieces, ranges: KeyRanges, num_keys: Ints, cost_of_shared: float) -> Groups:
    """
    Group neighbouring pieces of a row so that few keys are gathered.

    Gathering whole paths copies a history once per branch. A group needs what all of its branches see of it only once;
    the rest of each path is gathered branch by branch. With a history of 900 tokens and a branch after each hundred,
    in three groups:

        branch after          800 700 600 500   400 300 200   100
        the group gathers     500               200           100      800 keys
        and a branch          300 200 100   0   200 100   0     0      900 keys, and its own   whole paths: 3,600 keys

    A piece joins the group before it while that costs no more than the group's pieces cost on average so far. For
    branches at regular distances, this is the size of groups that costs least: `√(2 · cost · history / distance)`.

    Takes the keys of each piece, its own tokens included, as ranges and as counts of shape `(num_pieces,)`, and the
    cost of a shared key relative to one that a piece has for itself.
    """
    before = (num_keys - (pieces.end - pieces.start)).tolist()  # keys that all queries of a piece see
    common = _common_with_previous(ranges, len(before))
    first, num_shared = [0], [before[0]]
    size, cost = 1, cost_of_shared * before[0]
    for piece in range(1, len(before)):
        shared = min(num_shared[-1], common[piece], before[piece])
        lost = num_shared[-1] - shared
        added = (size - cost_of_shared) * lost + before[piece] - shared
        if shared and added * size <= cost:
            num_shared[-1], size, cost = shared, size + 1, cost + added
        else:
            first.append(piece)
            num_shared.append(before[piece])
            size, cost = 1, cost_of_shared * before[piece]
    return Groups(np.array(first, np.int64), np.array(num_shared, np.int64))


def _common_with_previous(ranges: KeyRanges, num_pieces: int) -> list[int]:
    """Number of keys at the beginning of each piece's list that the list of the piece before begins with as well."""
    lists: list[list[tuple[int, int]]] = [[] for _ in range(num_pieces)]
    for piece, start, end in zip(ranges.piece.tolist(), ranges.start.tolist(), ranges.end.tolist(), strict=True):
        lists[piece].append((start, end))
    common = [0]
    for previous, own in pairwise(lists):
        total = 0
        for (start, end), (other_start, other_end) in zip(previous, own, strict=False):
            if start != other_start:
                break
            total += min(end, other_end) - start
            if end != other_end:
                break
        common.append(total)
    return common
