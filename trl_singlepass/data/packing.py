"""Pack rows of conversations into fewer, fuller ones: best-fit decreasing, with common prefixes kept together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from ..trees.image_features import FeatureNumbers, ImageReference, to_keys
from ..trees.rows import Row
from ..trees.shared_array import common_prefix_length
from ..trees.sharing import MIN_SHARED_TOKENS, join_with_shared_prefixes, shareable_length
from .arrow import ROWS_VERSION, has_image_columns, read_images, read_list, read_row, row_features, to_table
from .rows import PreparedRow


Prefixes = Callable[[int], NDArray[np.integer]]
# A group may begin again in the free part of a row if repeating its prefix takes at most this share of that part.
MAX_REPEATED_PART = 1 / 8


def pack_dataset(rows: Dataset, max_row_tokens: int, *, num_proc: int | None = None, name: str = "train") -> Dataset:
    """
    Return a dataset with fewer, fuller rows, in which conversations share the prefixes that they have in common.

    Both steps are cached by `datasets`: the row of each conversation (only its first tokens are read, from disk) and
    the packed rows (only those that are being joined are in memory).

    `rows` are prepared, none longer than `max_row_tokens`, without an indices mapping. Empty ones are left out.
    """
    fingerprint = Hasher.hash(("packing", ROWS_VERSION, rows._fingerprint, max_row_tokens))
    assigned = rows.with_format("arrow").map(
        _assign_table,
        batched=True,
        batch_size=None,
        fn_kwargs={"max_row_tokens": max_row_tokens},
        remove_columns=rows.column_names,
        features=Features({"members": List(Value("int64"))}),
        new_fingerprint=Hasher.hash((fingerprint, "placed")),
        desc=f"Assigning conversations of {name} dataset to rows",
    )
    features = row_features(has_images=has_image_columns(rows.column_names))
    return assigned.with_format(None).map(
        _join_batch,
        batched=True,
        batch_size=4,
        fn_kwargs={"rows": rows, "features": features},
        remove_columns=assigned.column_names,
        features=features,
        num_proc=min(num_proc or 1, len(assigned)) if num_proc else None,
        new_fingerprint=Hasher.hash((fingerprint, "packed")),
        desc=f"Packing {name} dataset",
    )


def _assign_table(table: pa.Table, max_row_tokens: int) -> pa.Table:
    input_ids, lengths = table["input_ids"], table["num_tokens"].to_numpy()
    token_parts, subtree_end = table["token_parts"], table["subtree_end"]
    shareable = [
        shareable_length(read_list(token_parts, i) > 0, read_list(subtree_end, i)) for i in range(len(lengths))
    ]
    keys = _PrefixKeys()

    def prefix(i: int) -> NDArray[np.integer]:
        tokens = read_list(input_ids, i)[: shareable[i]]
        if not has_image_columns(table.column_names):
            return tokens
        return keys(tokens, read_list(table["image_features"], i)[: shareable[i]], read_images(table, i))

    members = assign_to_rows(lengths, prefix, max_row_tokens)
    return pa.table({"members": pa.array(members, pa.list_(pa.int64()))})


class _PrefixKeys:
    """What prefixes of rows are compared by: their tokens, and the images that these show by their content."""

    def __init__(self) -> None:
        self._numbers = FeatureNumbers()

    def __call__(
        self, tokens: NDArray[np.integer], features: NDArray[np.integer], images: Sequence[ImageReference]
    ) -> NDArray[np.int64]:
        return to_keys(tokens.astype(np.int64), self._numbers.renumber(features.astype(np.int64), images))


def pack_rows(rows: Sequence[Row], max_row_tokens: int) -> list[Row]:
    """Return rows packed into fewer, fuller ones, as [`pack_dataset`] does."""
    return [join_with_shared_prefixes([rows[i] for i in members]) for members in assign(rows, max_row_tokens)]


def assign(rows: Sequence[Row], max_row_tokens: int) -> list[list[int]]:
    """Return the numbers of the rows that share each packed row; arguments as for [`pack_rows`]."""
    shareable = [shareable_length(row.token_parts > 0, row.subtree_end) for row in rows]
    keys = _PrefixKeys()

    def prefix(i: int) -> NDArray[np.integer]:
        row = rows[i]
        return keys(row.input_ids[: shareable[i]], row.all_image_features()[: shareable[i]], row.images)

    return assign_to_rows([len(row) for row in rows], prefix, max_row_tokens)


def _join_batch(batch: Mapping[str, list[list[int]]], rows: Dataset, features: Features) -> pa.Table:
    table = rows.data.table
    packed = [join_with_shared_prefixes([read_row(table, i) for i in members]) for members in batch["members"]]
    return to_table(list(map(PreparedRow, packed)), features)


# Which rows share one ------------------------------------------------------------------------------------------------


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


# Groups --------------------------------------------------------------------------------------------------------------


class _RowNumbers:
    """Growing array of row numbers that drops full rows now and then."""

    def __init__(self) -> None:
        self._buffer = np.empty(4, np.int64)
        self._length = 0

    def append(self, row: int) -> None:
        """Append a row."""
        if self._length == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[self._length] = row
        self._length += 1

    def drop_full(self, room: NDArray[np.int64], least: int) -> NDArray[np.int64]:
        """Return the rows, without those that have less room than `least` once they are more than half."""
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
    """Conversations with a common prefix."""

    depth: int  # number of tokens in the prefix
    parent: Group | None  # the group with the next shorter prefix
    members: list[int] = field(default_factory=list)  # conversations that are in no subgroup
    subgroups: list[Group] = field(default_factory=list)  # groups with longer prefixes
    longest: int = 0  # tokens of the longest conversation, those of subgroups included
    least: int = 2**62  # fewest tokens that a conversation has after the prefix
    remaining: int = 0  # tokens after the prefix in all conversations that have no row yet
    rows: _RowNumbers = field(default_factory=_RowNumbers)  # rows that hold the prefix

    def path(self) -> Iterator[Group]:
        """Yield the group and all groups that contain it."""
        group: Group | None = self
        while group is not None:
            yield group
            group = group.parent


@dataclass(slots=True, eq=False)
class _Node:
    """Node of a radix tree; its tokens are those of conversation `reference`, from the parent's depth to its own."""

    depth: int
    reference: int
    ending: list[int] = field(default_factory=list)
    children: dict[int, _Node] = field(default_factory=dict)


def group_by_prefix(sizes: NDArray[np.int64], prefixes: Prefixes) -> Iterator[tuple[Group, int]]:
    """
    Yield conversations in the order in which they are assigned to rows, each with the smallest group that it is in.
    Groups come one after the other, the one with the longest conversation first.

    For example, conversations 0 to 4 have 90, 70, 80, 60 and 50 tokens; 0 and 2 begin with the same 40 tokens, 1 and 4
    with 40 others. That makes two groups of depth 40. The longest conversation is in the first group, so 0 and 2 come
    first, then 1 and 4, whose longest has 70 tokens, and then 3.

    `sizes`, `(num_conversations,)`, int64, are the tokens of each conversation; those with 0 are left out.
    `prefixes(i)` returns the first tokens of conversation `i`, those that it can share.
    """
    root = _Node(0, -1)
    for index in np.flatnonzero(sizes):
        _insert(root, int(index), prefixes)
    yield from _in_order(_form_groups(root, sizes), sizes)


def _insert(root: _Node, index: int, prefixes: Prefixes) -> None:
    """Add a conversation; a node of which it shares only the first tokens is split there."""
    tokens = prefixes(index)
    node, depth = root, 0
    while depth < len(tokens):
        child = node.children.get(int(tokens[depth]))
        if child is None:
            node.children[int(tokens[depth])] = _Node(len(tokens), index, [index])
            return
        stored = prefixes(child.reference)[depth : child.depth]
        shared = common_prefix_length(stored, tokens[depth:])
        if shared < len(stored):
            middle = _Node(depth + shared, index, [], {int(stored[shared]): child})
            node.children[int(tokens[depth])] = middle
            child = middle
        node, depth = child, depth + shared
    node.ending.append(index)


def _form_groups(root: _Node, sizes: NDArray[np.int64]) -> Group:
    """Return a group of all conversations, with subgroups where two or more have enough further tokens in common."""
    whole = Group(0, None)
    stack = [(root, whole)]
    while stack:
        node, group = stack.pop()
        is_fork = len(node.ending) + len(node.children) > 1
        if is_fork and node.depth - group.depth >= MIN_SHARED_TOKENS:
            group.subgroups.append(Group(node.depth, group))
            group = group.subgroups[-1]
        for index in node.ending:
            _add_member(group, index, int(sizes[index]))
        stack += [(child, group) for child in node.children.values()]
    return whole


def _add_member(group: Group, index: int, size: int) -> None:
    group.members.append(index)
    for each in group.path():
        each.longest = max(each.longest, size)
        each.least = min(each.least, size - each.depth)
        each.remaining += size - each.depth


def _in_order(whole: Group, sizes: NDArray[np.int64]) -> Iterator[tuple[Group, int]]:
    """Yield the members of a group and, in between, those of its subgroups: whichever holds the longest first."""
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
