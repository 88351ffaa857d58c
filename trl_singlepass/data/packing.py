"""Which conversations share a row: best fit decreasing, those that begin alike together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .packing_groups import Group, group_by_beginning


# A group may start in what another left of a row if at most this part of it goes to repeating the group's beginning.
MAX_REPEATED_PART = 1 / 8


def place(
    lengths: Sequence[int], beginnings: Callable[[int], NDArray[np.integer]], max_row_tokens: int
) -> list[list[int]]:
    """
    Place conversations in rows so that few tokens are repeated and rows are full.

    Conversations are taken group by group, a group being those that begin with the same system prompt, tools or
    examples, the one with the longest conversation first and long ones first within it (best fit decreasing). Each
    goes to the fullest row that holds its beginning and has room for the rest; otherwise its group starts anew, where
    there is room for all that is left of the group or where repeating the beginning costs little, or in a new row.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each conversation, none more than `max_row_tokens`; those with 0 are left out.
        beginnings (`Callable`):
            Returns the first tokens of conversation `i`, up to its first fork or target: what it can share.
        max_row_tokens (`int`):
            Capacity of a row, in tokens.

    Returns:
        `list[list[int]]`: For each row, the conversations in it, in the order of the dataset.

    Raises:
        `ValueError`: If a conversation is longer than a row.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and sizes.max() > max_row_tokens:
        raise ValueError(
            f"Conversation {int(sizes.argmax())} has {int(sizes.max())} tokens, a row has max_row_tokens="
            f"{max_row_tokens}. Split it first, or raise max_row_tokens."
        )
    rows = _Rows(max_row_tokens)
    for group, member in group_by_beginning(sizes, beginnings):
        rows.add(member, int(sizes[member]), group)
    return [sorted(members) for members in rows.members]


class _Rows:
    """Rows under construction: the room left in each, and which groups it holds."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._room = np.empty(1024, np.int64)
        self.members: list[list[int]] = []

    def add(self, member: int, size: int, group: Group) -> None:
        """Place one conversation of a group, and count it off the group's rest."""
        row, shared, started = self._find(size, group)
        self._room[row] -= size - shared
        self.members[row].append(member)
        for each in started:
            each.rows.append(row)
        for each in group.path():
            each.count_off(size)

    def _find(self, size: int, group: Group) -> tuple[int, int, list[Group]]:
        """Row, the tokens shared there, and the groups that start in it."""
        row = self._tightest(group, size - group.depth)
        if row is not None:
            return row, group.depth, []
        started = []
        child, parent = group, group.parent
        while parent is not None:
            started.append(child)
            repeated = child.depth - parent.depth
            wanted = min(repeated + child.rest, int(repeated / MAX_REPEATED_PART))
            row = self._tightest(parent, max(size - parent.depth, wanted))
            if row is not None:
                return row, parent.depth, started
            child, parent = parent, parent.parent
        return self._new_row(), 0, [*started, child]

    def _tightest(self, group: Group, wanted: int) -> int | None:
        """Of the rows that hold a group and have so much room, the one with the least."""
        rows = group.rows.drop_full(self._room, group.least)
        room = self._room[rows]
        fits = room >= wanted
        if not fits.any():
            return None
        return int(rows[np.where(fits, room, self._capacity + 1).argmin()])

    def _new_row(self) -> int:
        row = len(self.members)
        if row == len(self._room):
            self._room = np.concatenate([self._room, np.empty_like(self._room)])
        self._room[row] = self._capacity
        self.members.append([])
        return row
