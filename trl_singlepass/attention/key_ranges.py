"""
Which keys a piece of a run can see, as ranges of positions, for all pieces of a row at once (numpy).

The examples of this folder share a row of ten tokens: a history of three, and two branches of four and three.

    position       0  1  2  3  4  5  6  7  8  9
    depth          0  1  2  3  4  5  6  3  4  5
    subtree_end   10 10 10  7  7  7  7 10 10 10
    runs          [0, 7)              [7, 10) with ancestors [0, 3)
"""

from __future__ import annotations

from dataclasses import dataclass

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
