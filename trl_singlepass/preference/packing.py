"""Which pairs and turns of a batch share a row, and where the targets of each turn are in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.packed_dataset import assign
from ..trees.prefix_tree import PrefixTree
from ..trees.rows import Row, number_images_together
from ..trees.sample import Sample
from ..trees.sharing import group_by_beginning
from ..trees.splitting import split_samples
from .rows import LENGTH_COLUMNS, POSITION_COLUMNS, target_positions


class Turn(NamedTuple):
    """A turn of a batch of pairs."""

    pair: int
    """Number of its pair in the batch."""
    side: int
    """0 in the chosen trajectory, 1 in the rejected one."""
    number: int
    """Number of the turn among those of its trajectory that count."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """A row, and the turns that stand in it."""

    row: Row
    positions: Mapping[Turn, NDArray[np.int64]]  # by turn, the positions in the row that predict its trained tokens

    @classmethod
    def from_example(cls, example: Mapping[str, Any], pair: int) -> PackedRow:
        """Return a pair of the dataset, given by `PAIR_COLUMNS`, as a row of its own."""
        positions: dict[Turn, NDArray[np.int64]] = {}
        for side, (column, lengths_column) in enumerate(zip(POSITION_COLUMNS, LENGTH_COLUMNS, strict=True)):
            ends = np.cumsum(np.asarray(example[lengths_column], np.int64))
            turns = np.split(np.asarray(example[column], np.int64), ends[:-1])
            positions |= {Turn(pair, side, number): turn for number, turn in enumerate(turns)}
        return cls(Row.from_columns(example), positions)

    @classmethod
    def from_samples(cls, samples: Mapping[Turn, Sample]) -> PackedRow:
        """Return turns as one tree, in which all their common prefixes are stored once."""
        tree = PrefixTree.from_samples(list(samples.values()))
        positions = target_positions(tree, list(samples.values()))
        return cls(Row.from_tree(tree), dict(zip(samples, positions, strict=True)))

    @classmethod
    def join(cls, packed: Sequence[PackedRow]) -> PackedRow:
        """Return several rows side by side in one."""
        starts = np.cumsum([0] + [len(each.row) for each in packed[:-1]])
        positions = {
            turn: start + positions
            for start, each in zip(starts, packed, strict=True)
            for turn, positions in each.positions.items()
        }
        return cls(Row.join([each.row for each in packed]), positions)

    def samples(self) -> dict[Turn, Sample]:
        """
        Return the samples of the turns: each ends in its last trained token, whose path holds all before it.

        For `subtree_end = [6, 4, 4, 4, 6, 6]` and a turn with the position 5 as its last one, the path is
        `[0, 4, 5]`, since position `j` is an ancestor of 5 exactly when `j <= 5 < subtree_end[j]`.
        """
        row, samples = self.row, {}
        for turn, positions in self.positions.items():
            last = positions[-1]
            path = np.flatnonzero(row.subtree_end[: last + 1] > last)
            weights = np.zeros(len(path) + 1)
            weights[np.searchsorted(path, positions) + 1] = 1
            features = None if row.image_features is None else np.append(row.image_features[path], -1)
            samples[turn] = Sample(
                token_ids=np.append(row.input_ids[path], row.labels[last + 1]),
                loss_weights=weights,
                prompt_length=int(np.searchsorted(path, positions[0])) + 1,
                image_features=features,
                images=row.images,
            )
        return samples


def pack_pairs(examples: Sequence[Mapping[str, Any]], max_row_tokens: int | None = None) -> list[PackedRow]:
    """
    Return the rows of a batch of pairs.

    Pairs that begin alike share their common prefixes. A pair with a larger tree than a row is split between turns,
    and each part repeats the history that it needs; every turn stands in exactly one row.

    Takes examples with `PAIR_COLUMNS`. `max_row_tokens` is the capacity of a row; `None` makes one row of all. A
    single turn that is longer, with its context, than a row raises `ValueError`.
    """
    parts = [part for i, example in enumerate(examples) for part in _split(example, i, max_row_tokens)]
    rows = [part.row for part in parts]
    members = [list(range(len(parts)))] if max_row_tokens is None else assign(rows, max_row_tokens)
    return [_share_prefixes([parts[i] for i in of_row]) for of_row in members]


def _split(example: Mapping[str, Any], pair: int, max_row_tokens: int | None) -> Iterable[PackedRow]:
    packed = PackedRow.from_example(example, pair)
    if max_row_tokens is None or len(packed.row) <= max_row_tokens:
        yield packed
        return
    samples = packed.samples()
    turns = iter(samples)
    for part in split_samples(list(samples.values()), max_row_tokens):
        yield PackedRow.from_samples({next(turns): sample for sample in part})


def _share_prefixes(parts: Sequence[PackedRow]) -> PackedRow:
    """Return parts in one row, those that begin alike as one tree."""
    groups = group_by_beginning([part.row for part in parts])
    return PackedRow.join([_merge([parts[i] for i in group]) for group in groups])


def _merge(parts: Sequence[PackedRow]) -> PackedRow:
    if len(parts) == 1:
        return parts[0]
    rows = [part.row for part in parts]
    if any(row.image_features is not None for row in rows):
        features, images = number_images_together(rows)
        rows = [replace(row, image_features=of_row, images=images) for row, of_row in zip(rows, features, strict=True)]
    samples: dict[Turn, Sample] = {}
    for part, row in zip(parts, rows, strict=True):
        samples |= replace(part, row=row).samples()
    return PackedRow.from_samples(samples)
