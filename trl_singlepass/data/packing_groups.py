"""Conversations grouped by how they begin: a prefix tree of beginnings that holds references instead of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..trees.sharing import MIN_SHARED_TOKENS


Beginnings = Callable[[int], NDArray[np.integer]]


class RowNumbers:
    """Growing array of row numbers, from which full rows are dropped now and then."""

    def __init__(self) -> None:
        self._buffer = np.empty(4, np.int64)
        self._length = 0

    def append(self, row: int) -> None:
        """Add a row."""
        if self._length == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[self._length] = row
        self._length += 1

    def drop_full(self, room: NDArray[np.int64], least: int) -> NDArray[np.int64]:
        """Return the rows; once half of them have less room than `least`, those are forgotten."""
        rows = self._buffer[: self._length]
        if self._length < 32:
            return rows
        has_room = room[rows] >= least
        if 2 * int(has_room.sum()) < self._length:
            rows = rows[has_room]
            self._length = len(rows)
            self._buffer[: self._length] = rows
        return rows


@dataclass(slots=True, eq=False)
class Group:
    """
    Conversations that begin with the same tokens.

    Args:
        depth (`int`):
            Number of tokens that they have in common.
        parent (`Group`, *optional*):
            The group of those that have fewer tokens in common.
        members (`list[int]`, *optional*):
            Conversations that are in no smaller group, the longest first.
        subgroups (`list[Group]`, *optional*):
            Smaller groups within.
        longest (`int`, *optional*, defaults to 0):
            Tokens of the longest conversation in the group.
        least (`int`, *optional*):
            Fewest tokens that one of its conversations has after those in common.
        rest (`int`, *optional*, defaults to 0):
            Tokens that the conversations not placed yet have after those in common.
        rows (`RowNumbers`, *optional*):
            Rows that hold the group.
    """

    depth: int
    parent: Group | None
    members: list[int] = field(default_factory=list)
    subgroups: list[Group] = field(default_factory=list)
    longest: int = 0
    least: int = 2**62
    rest: int = 0
    rows: RowNumbers = field(default_factory=RowNumbers)

    def path(self) -> Iterator[Group]:
        """Yield the group and all groups that it lies in."""
        group: Group | None = self
        while group is not None:
            yield group
            group = group.parent

    def count_off(self, size: int) -> None:
        """Take a conversation that has been placed off the rest."""
        self.rest -= size - self.depth


@dataclass(slots=True, eq=False)
class _Node:
    """Node of the tree of beginnings; its tokens are those of `reference`, from the parent's depth to its own."""

    depth: int
    reference: int
    ending: list[int] = field(default_factory=list)
    children: dict[int, _Node] = field(default_factory=dict)


def group_by_beginning(sizes: NDArray[np.int64], beginnings: Beginnings) -> Iterator[tuple[Group, int]]:
    """
    Yield conversations in the order in which they are placed.

    Args:
        sizes (`numpy.ndarray` of shape `(num_conversations,)`, `numpy.int64`):
            Tokens of each conversation; those with 0 are left out.
        beginnings (`Callable`):
            Returns the first tokens of conversation `i`, those that it can share.

    Yields:
        `tuple[Group, int]`: The smallest group of a conversation, and the conversation. Groups come one after the
            other, the one with the longest conversation first.
    """
    root = _Node(0, -1)
    for index in np.flatnonzero(sizes):
        _insert(root, int(index), beginnings)
    yield from _in_order(_grouped(root, sizes), sizes)


def _insert(root: _Node, index: int, beginnings: Beginnings) -> None:
    tokens = beginnings(index)
    node, depth = root, 0
    while depth < len(tokens):
        child = node.children.get(int(tokens[depth]))
        if child is None:
            node.children[int(tokens[depth])] = _Node(len(tokens), index, [index])
            return
        stored = beginnings(child.reference)[depth : child.depth]
        length = min(len(stored), len(tokens) - depth)
        differs = stored[:length] != tokens[depth : depth + length]
        shared = int(differs.argmax()) if differs.any() else length
        if shared < len(stored):
            middle = _Node(depth + shared, index, [], {int(stored[shared]): child})
            node.children[int(tokens[depth])] = middle
            child = middle
        node, depth = child, depth + shared
    node.ending.append(index)


def _grouped(root: _Node, sizes: NDArray[np.int64]) -> Group:
    """Return the groups worth forming: two or more conversations, enough tokens in common."""
    whole = Group(0, None)
    stack = [(root, whole)]
    while stack:
        node, group = stack.pop()
        is_fork = len(node.ending) + len(node.children) > 1
        if is_fork and node.depth - group.depth >= MIN_SHARED_TOKENS:
            group.subgroups.append(Group(node.depth, group))
            group = group.subgroups[-1]
        for index in node.ending:
            _enter(group, index, int(sizes[index]))
        stack += [(child, group) for child in node.children.values()]
    return whole


def _enter(group: Group, index: int, size: int) -> None:
    group.members.append(index)
    for each in group.path():
        each.longest = max(each.longest, size)
        each.least = min(each.least, size - each.depth)
        each.rest += size - each.depth


def _in_order(whole: Group, sizes: NDArray[np.int64]) -> Iterator[tuple[Group, int]]:
    stack: list[tuple[Group, int | None]] = [(whole, None)]
    while stack:
        group, member = stack.pop()
        if member is not None:
            yield group, member
            continue
        entries: list[tuple[int, Group, int | None]] = [(int(sizes[i]), group, i) for i in group.members]
        entries += [(subgroup.longest, subgroup, None) for subgroup in group.subgroups]
        entries.sort(key=lambda entry: entry[0])
        stack += [(subgroup, i) for _, subgroup, i in entries]
