"""
Which neighbouring pieces of a row attend to a common beginning of their paths together.

Gathering the whole path of every branch copies a history once per branch. A group of neighbouring branches needs what
all of them see of it only once, for all their queries; only the rest of each path is gathered branch by branch. With a
history of 900 tokens and a branch after each hundred, in three groups:

    branch after          800 700 600 500   400 300 200   100
    the group gathers     500               200           100      800 keys
    and a branch          300 200 100   0   200 100   0     0      900 keys, and its own      whole paths: 3,600 keys
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .key_ranges import Ints, KeyRanges, Pieces


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
    Group the pieces of a row so that few keys are gathered.

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
