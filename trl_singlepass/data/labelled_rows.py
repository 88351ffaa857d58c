"""Rows of labelled lists of samples in a batch: which of them share a row, and where the targets of each turn are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from ..trees.prefix_tree import find_paths
from ..trees.rows import Row, TreePlan, tree_ends
from ..trees.sharing import group_by_beginning, merge_to_tree
from .arrow import length_column, position_column
from .packing import assign


class Turn(NamedTuple):
    """A turn of a batch."""

    label: int
    """Number of the list that it is in: 0 in the chosen trajectory of a pair, 1 in the rejected one."""
    example: int
    """Number of its example in the batch."""
    number: int
    """Number of the turn among those of its list that count."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """A row, and the turns that stand in it."""

    row: Row
    positions: Mapping[Turn, NDArray[np.int64]]  # by turn, the positions in the row that predict its trained tokens

    @classmethod
    def from_example(cls, example: Mapping[str, Any], number: int, labels: Sequence[str]) -> PackedRow:
        """Return an example of a prepared dataset, which is the given one of its batch, as a row of its own."""
        positions: dict[Turn, NDArray[np.int64]] = {}
        for index, label in enumerate(labels):
            ends = np.cumsum(np.asarray(example[length_column(label)], np.int64))
            turns = np.split(np.asarray(example[position_column(label)], np.int64), ends[:-1])
            positions |= {Turn(index, number, turn): of_turn for turn, of_turn in enumerate(turns)}
        return cls(Row.from_columns(example), positions)

    @classmethod
    def join(cls, packed: Sequence[PackedRow]) -> PackedRow:
        """Return several rows side by side in one."""
        starts = zip(np.cumsum([0, *(len(each.row) for each in packed[:-1])]), packed, strict=True)
        positions = {turn: start + at for start, each in starts for turn, at in each.positions.items()}
        return cls(Row.join([each.row for each in packed]), positions)

    def split(self, max_row_tokens: int) -> list[PackedRow]:
        """Return the row, or each of its trees as a row of its own if it is longer than `max_row_tokens`."""
        if len(self.row) <= max_row_tokens:
            return [self]
        trees = self.row.split()
        _check_trees_fit(self.row.subtree_end, max_row_tokens)
        starts = np.cumsum([0, *map(len, trees)])
        tree_of = {turn: int(np.searchsorted(starts, at[0], "right")) - 1 for turn, at in self.positions.items()}
        return [
            PackedRow(tree, {turn: at - starts[i] for turn, at in self.positions.items() if tree_of[turn] == i})
            for i, tree in enumerate(trees)
        ]

    def path_to(self, turn: Turn) -> NDArray[np.int64]:
        """
        Return the positions of all tokens before the last trained one of a turn.

        Position `j` is an ancestor of `i`, or `i` itself, exactly when `j <= i < subtree_end[j]`.
        """
        last = self.positions[turn][-1]
        return np.flatnonzero(self.row.subtree_end[: last + 1] > last)


def check_rows_fit(rows: Dataset, max_row_tokens: int) -> None:
    """Refuse a prepared dataset with a tree that is larger than a row, before it is trained."""
    for batch in rows.with_format("numpy", columns=["subtree_end"]).iter(256):
        for subtree_end in batch["subtree_end"]:
            _check_trees_fit(subtree_end, max_row_tokens)


def _check_trees_fit(subtree_end: NDArray[np.integer], max_row_tokens: int) -> None:
    longest = max(end - start for start, end in pairwise([0, *tree_ends(subtree_end)]))
    if longest > max_row_tokens:
        raise ValueError(
            f"A tree of {longest} tokens does not fit into a row of max_row_tokens={max_row_tokens}: its example was "
            "prepared for larger rows. Prepare it again, from its messages, or raise max_row_tokens."
        )


def pack_examples(
    examples: Sequence[Mapping[str, Any]], labels: Sequence[str], max_row_tokens: int | None = None
) -> list[PackedRow]:
    """
    Return the rows of a batch of prepared examples, whose lists of samples have `labels`.

    Examples that begin alike share their common prefixes. One that was split when it was prepared may stand in several
    rows; every turn stands in exactly one. `max_row_tokens` is the capacity of a row; `None` makes one row of all.
    """
    parts = [PackedRow.from_example(example, i, labels) for i, example in enumerate(examples)]
    if max_row_tokens is None:
        return [_share_prefixes(parts)]
    parts = [part for each in parts for part in each.split(max_row_tokens)]
    members = assign([part.row for part in parts], max_row_tokens)
    return [_share_prefixes([parts[i] for i in of_row]) for of_row in members]


def positions_of_lists(
    packed: Sequence[PackedRow], lengths: Sequence[int]
) -> dict[tuple[int, int], NDArray[np.int64]]:
    """
    Return by label and example of each list of a batch the positions that predict its trained tokens, turn by turn.

    Positions are counted over all rows one after the other, of which `lengths` are the tokens, padding included.
    """
    starts = np.cumsum([0, *lengths[:-1]])
    found = {
        turn: start + at for start, each in zip(starts, packed, strict=True) for turn, at in each.positions.items()
    }
    lists = groupby(sorted(found), key=lambda turn: (turn.label, turn.example))
    return {key: np.concatenate([found[turn] for turn in turns]) for key, turns in lists}


def _share_prefixes(parts: Sequence[PackedRow]) -> PackedRow:
    """Return parts in one row, those that begin alike as one tree."""
    groups = group_by_beginning([part.row for part in parts])
    return PackedRow.join([_merge([parts[i] for i in group]) for group in groups])


def _merge(parts: Sequence[PackedRow]) -> PackedRow:
    """Return parts as one tree, in which each turn is found by its tokens, the last trained one included."""
    if len(parts) == 1:
        return parts[0]
    tree, keys = merge_to_tree([part.row for part in parts])
    turns = [(part, of_part, turn) for part, of_part in zip(parts, keys, strict=True) for turn in part.positions]
    paths = [part.path_to(turn) for part, _, turn in turns]
    labels = {id(part): part.row.targets(TreePlan.from_subtree_end(part.row.subtree_end)).labels for part in parts}
    tokens = [
        np.append(of_part[path], labels[id(part)][path[-1] + 1])
        for (part, of_part, _), path in zip(turns, paths, strict=True)
    ]
    positions = {
        turn: found[np.searchsorted(path, part.positions[turn])]
        for (part, _, turn), path, found in zip(turns, paths, find_paths(tree, tokens), strict=True)
    }
    return PackedRow(Row.from_tree(tree), positions)
