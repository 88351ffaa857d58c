"""Trees to rows: one or more trees in one token sequence, and the runs that kernels work on."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .prefix_tree import PrefixTree


ROW_COLUMNS = ("input_ids", "subtree_end", "labels", "loss_weights", "label_parts", "multiplicity")


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """
    One or more trees laid out in one token sequence; arrays of shape `(num_tokens,)` as in [`PrefixTree`].

    Depths are not stored: they follow from `subtree_end` (see [`TreePlan`]).

    Args:
        input_ids (`numpy.ndarray` of `numpy.int64`):
            Tokens.
        subtree_end (`numpy.ndarray` of `numpy.int64`):
            For each token, the position just past its last descendant, counted in tokens from the start of the row.
        labels (`numpy.ndarray` of `numpy.int64`):
            Rolled targets: `labels[i + 1]` is what position `i` must predict.
        loss_weights (`numpy.ndarray` of `numpy.float64`):
            Factor of the loss of each label; 0 where there is none.
        label_parts (`numpy.ndarray` of `numpy.int64`):
            For each label, what it is part of ([`Sample.token_parts`]); 0 where there is none.
        multiplicity (`numpy.ndarray` of `numpy.int64`):
            Number of samples that pass through each token.
    """

    input_ids: NDArray[np.int64]
    subtree_end: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_weights: NDArray[np.float64]
    label_parts: NDArray[np.int64]
    multiplicity: NDArray[np.int64]

    @classmethod
    def from_tree(cls, tree: PrefixTree) -> Row:
        """Return the row that holds one tree."""
        return cls(*(getattr(tree, name) for name in ROW_COLUMNS))

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> Row:
        """Return the row that a dataset holds under `ROW_COLUMNS`."""
        integers = {name: np.asarray(columns[name], np.int64) for name in ROW_COLUMNS if name != "loss_weights"}
        return cls(**integers, loss_weights=np.asarray(columns["loss_weights"], np.float64))

    @classmethod
    def join(cls, rows: Sequence[Row]) -> Row:
        """Return one row that holds the trees of several rows side by side."""
        offsets = np.cumsum([0] + [len(row) for row in rows[:-1]])
        joined = {name: np.concatenate([getattr(row, name) for row in rows]) for name in ROW_COLUMNS}
        joined["subtree_end"] = joined["subtree_end"] + np.repeat(offsets, [len(row) for row in rows])
        return cls(**joined)

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the row as dataset columns."""
        return {name: getattr(self, name) for name in ROW_COLUMNS}

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Run:
    """
    Maximal stretch of a row in which every token's parent is the token before it.

    Args:
        start (`int`):
            Position of the first token in the row.
        end (`int`):
            Position just past the last token in the row.
        depth (`int`):
            Depth of the first token: the number of tokens in `prefix`.
        prefix (`tuple[tuple[int, int], ...]`):
            Half-open ranges of row positions that hold the ancestors of the first token, in the order of their depth.
    """

    start: int
    end: int
    depth: int
    prefix: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class TreePlan:
    """
    Structure of a row in plain integers: what a kernel needs to run tree attention without asking the device.

    Args:
        length (`int`):
            Number of tokens of the row.
        runs (`tuple[Run, ...]`):
            Runs in row order; together they cover the row.
        example_ends (`tuple[int, ...]`):
            For each dataset row in it, the position just past its last token.
        num_sample_tokens (`int`):
            Number of tokens of all samples in it: what N-pass computes.
    """

    length: int
    runs: tuple[Run, ...]
    example_ends: tuple[int, ...] = ()
    num_sample_tokens: int = 0

    @classmethod
    def from_rows(cls, rows: Sequence[Row]) -> TreePlan:
        """Return the plan of dataset rows side by side in one row."""
        return replace(
            cls.from_subtree_end(Row.join(rows).subtree_end),
            example_ends=tuple(np.cumsum([len(row) for row in rows]).tolist()),
            num_sample_tokens=sum(int(row.multiplicity.sum()) for row in rows),
        )

    @classmethod
    def from_subtree_end(cls, subtree_end: NDArray[np.int64]) -> TreePlan:
        """
        Return the plan of a row.

        Args:
            subtree_end (`numpy.ndarray` of shape `(num_tokens,)`, `numpy.int64`):
                For each token, the position just past its last descendant, counted in tokens from the start of the
                row.

        Returns:
            `TreePlan`: The plan.
        """
        length = len(subtree_end)
        positions = np.arange(1, length)
        starts = [0, *positions[subtree_end[:-1] <= positions].tolist()] if length else []
        runs: list[Run] = []
        path: list[tuple[int, int]] = []  # runs that can still hold ancestors
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            path = [(first, _end_of_ancestors(subtree_end, first, last, start)) for first, last in path]
            path = [(first, last) for first, last in path if first < last]
            runs.append(Run(start, end, sum(last - first for first, last in path), tuple(path)))
            path.append((start, end))
        return cls(length, tuple(runs))

    def depths(self) -> NDArray[np.int64]:
        """Return the depth of each token: the `position_ids` of the row."""
        if not self.runs:
            return np.empty(0, np.int64)
        return np.concatenate([np.arange(run.depth, run.depth + run.end - run.start) for run in self.runs])


def _end_of_ancestors(subtree_end: NDArray[np.int64], first: int, last: int, position: int) -> int:
    """Position just past the last ancestor of `position` within a run; along a run `subtree_end` never grows."""
    return bisect_left(range(last), -position, lo=first, key=lambda j: -subtree_end[j])
