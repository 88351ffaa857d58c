"""Which conversations share a row: best-fit decreasing, with common prefixes kept together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .packing_groups import Group, Prefixes, group_by_prefix


# A group may begin again in the free part of a row if repeating its prefix takes at most this share of that part.
MAX_REPEATED_PART = 1 / 8


def assign_to_rows(lengths: Sequence[int], prefixes: Prefixes, max_row_tokens: int) -> list[list[int]]:
    """
    Assign conversations to rows so that few tokens are repeated and rows are full.

    A group is the conversations that begin with the same system prompt, tools or few-shot examples. Conversations are
    taken group by group, the group with the longest conversation first, and long ones first within it (best-fit
    decreasing). Each goes to the fullest row that holds the group's prefix and has room for the rest. If there is
    none, the group begins again: in a row with room for all that is left of the group, in one where repeating the
    prefix costs little, or in a new row.

    For example, rows of 200 tokens, conversations 0 to 2 with 140 tokens and no common prefix, and 3 to 7 with 60
    tokens of which the first 50 are the same. The first three take a row each and leave 60 tokens free. One of the
    others would fit there, but the group needs 50 + 5 · 10 tokens, and the repeated prefix would be more than an
    eighth of the free part. So the group begins in a new row: `[[2], [1], [0], [3, 4, 5, 6, 7]]`.

    `prefixes(i)` returns the first tokens of conversation `i`, up to its first fork or target: what it can share.
    Conversations without tokens are left out; one longer than a row is a `ValueError`. Returns the conversations in
    each row, in the order of the dataset.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and sizes.max() > max_row_tokens:
        raise ValueError(
            f"Conversation {int(sizes.argmax())} has {int(sizes.max())} tokens, a row has max_row_tokens="
            f"{max_row_tokens}. Split it first, or raise max_row_tokens."
        )
    rows = _Rows(max_row_tokens)
    for group, member in group_by_prefix(sizes, prefixes):
        rows.add(member, int(sizes[member]), group)
    return [sorted(members) for members in rows.members]


class _Rows:
    """Rows under construction: the room left in each, and which groups it holds."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._room = np.empty(1024, np.int64)
        self.members: list[list[int]] = []

    def add(self, member: int, size: int, group: Group) -> None:
        """Assign one conversation of a group to a row."""
        row, shared, started = self._find(size, group)
        self._room[row] -= size - shared
        self.members[row].append(member)
        for each in started:
            each.rows.append(row)
        for each in group.path():
            each.remaining -= size - each.depth

    def _find(self, size: int, group: Group) -> tuple[int, int, list[Group]]:
        """Return a row, the number of tokens shared there, and the groups that begin in it."""
        row = self._tightest(group, size - group.depth)
        if row is not None:
            return row, group.depth, []
        started = []
        child, parent = group, group.parent
        while parent is not None:
            started.append(child)
            repeated = child.depth - parent.depth
            wanted = min(repeated + child.remaining, int(repeated / MAX_REPEATED_PART))
            row = self._tightest(parent, max(size - parent.depth, wanted))
            if row is not None:
                return row, parent.depth, started
            child, parent = parent, parent.parent
        return self._new_row(), 0, [*started, child]

    def _tightest(self, group: Group, wanted: int) -> int | None:
        """Return the row with the least room among those that hold a group and have the room wanted."""
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
