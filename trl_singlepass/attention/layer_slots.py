"""Which slots of a cache one attention layer keeps, and where the tokens of a row lie among them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..trees.rows import Ranges


SlotRanges = tuple[tuple[int, int, int], ...]
"""Ranges `[first, last)` of a row, each with the slot of its first token in a cache."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerSlots:
    """Slots of the layers of one mask type while they run over one row."""

    # Tokens of the row that later rows attend to in these layers, with their slots there. Slots are numbered in row
    # order, so those of a row follow one another.
    handed_on: SlotRanges
    # For each slot of these layers, int64: its number among the slots that any layer keeps. A full layer keeps them
    # all, a window only those it looks back to.
    kept: NDArray[np.int64]
    stores: bool  # whether the row runs for the first time, so that the cache does not hold these tokens yet

    @classmethod
    def from_row(cls, handed_on: SlotRanges, kept: NDArray[np.int64], *, stores: bool) -> LayerSlots:
        """
        Return the slots of layers that keep only some.

        Tokens 10 to 15 of a row have the slots 4 to 9. A layer that keeps the slots 2, 6, 7 and 9 has them as its own
        slots 0 to 3, so what it hands on is `((12, 14, 1), (15, 16, 3))`: tokens 12 and 13 from its slot 1 on, token
        15 in its slot 3.

        Takes the tokens that any later row attends to, in any layer, and the slots that these layers keep, sorted.
        """
        own: list[tuple[int, int, int]] = []
        for first, last, slot in handed_on:
            start, end = np.searchsorted(kept, (slot, slot + last - first)).tolist()
            borders = [start, *(np.flatnonzero(np.diff(kept[start:end]) > 1) + start + 1).tolist(), end]
            for begin, stop in pairwise(borders if start < end else []):
                position = first + int(kept[begin]) - slot
                own.append((position, position + stop - begin, begin))
        return cls(tuple(own), kept, stores)

    @property
    def stored_by_row(self) -> slice:
        """Slots of the tokens that the row hands on."""
        if not self.handed_on:
            return slice(0, 0)
        first, last, slot = self.handed_on[-1]
        return slice(self.handed_on[0][2], slot + last - first)

    def locate(self, ranges: Ranges, row_length: int) -> Ranges:
        """
        Return where keys lie: positions in the row stay, those past it become slots of the layer.

        In a row of 20 tokens, position 26 is slot 6. The layer of the example above holds it in its own slot 1, so
        `((26, 28), (0, 20))` becomes `((21, 23), (0, 20))`.
        """
        located = []
        for first, last in ranges:
            if first >= row_length:
                place = int(np.searchsorted(self.kept, first - row_length))
                assert self.kept[place + last - first - 1] == last - 1 - row_length, (
                    "a window looks back to tokens that are kept"
                )
                first, last = row_length + place, row_length + place + last - first
            located.append((first, last))
        return tuple(located)
