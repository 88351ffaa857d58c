"""Keys and values of tokens that ran before, which slots hold them, and the gradients that later tokens send back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .offload import HostCopies


SlotRanges = tuple[tuple[int, int, int], ...]
"""Ranges `[first, last)` of a row, each with the slot of its first token in a cache."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerSlots:
    """Slots of the layers of one mask type while they run over one row."""

    # Tokens of the row that later rows attend to in these layers, with their slots there. Slots are numbered in row
    # order, so those of a row follow one another.
    cached_for_later: SlotRanges
    # For each slot of these layers, int64: its number among the slots that any layer keeps. A full layer keeps them
    # all, a window only those it looks back to.
    kept: NDArray[np.int64]
    stores: bool  # whether the row runs for the first time, so that the cache does not hold these tokens yet

    @classmethod
    def from_row(cls, cached_for_later: SlotRanges, kept: NDArray[np.int64], *, stores: bool) -> LayerSlots:
        """
        Return the slots of layers that keep only some.

        Tokens 10 to 15 of a row have the slots 4 to 9. A layer that keeps the slots 2, 6, 7 and 9 has them as its own
        slots 0 to 3, so what it caches is `((12, 14, 1), (15, 16, 3))`: tokens 12 and 13 from its slot 1 on, token 15
        in its slot 3.

        Takes the tokens that any later row attends to, in any layer, and the slots that these layers keep, sorted.
        """
        own: list[tuple[int, int, int]] = []
        for first, last, slot in cached_for_later:
            start, end = np.searchsorted(kept, (slot, slot + last - first)).tolist()
            borders = [start, *(np.flatnonzero(np.diff(kept[start:end]) > 1) + start + 1).tolist(), end]
            for begin, stop in pairwise(borders if start < end else []):
                position = first + int(kept[begin]) - slot
                own.append((position, position + stop - begin, begin))
        return cls(tuple(own), kept, stores)

    @property
    def stored_by_row(self) -> slice:
        """Slots of the tokens that later rows attend to."""
        if not self.cached_for_later:
            return slice(0, 0)
        first, last, slot = self.cached_for_later[-1]
        return slice(self.cached_for_later[0][2], slot + last - first)

    def locate(self, positions: NDArray[np.int64], row_length: int) -> NDArray[np.int64]:
        """
        Return where keys lie: positions in the row stay, those past it become slots of the layer.

        In a row of 20 tokens, the positions 26 and 27 are the slots 6 and 7. The layer of the example above holds them
        in its own slots 1 and 2, so `[26, 27, 3]` becomes `[21, 22, 3]`.
        """
        slots = positions[positions >= row_length] - row_length
        places = np.searchsorted(self.kept, slots)
        assert np.array_equal(self.kept[places], slots), "a window looks back to tokens that are kept"
        located = positions.copy()
        located[positions >= row_length] = row_length + places
        return located


class KVCache:
    """
    Keys and values of one attention layer that later rows attend to, one slot per token.

    With `copies`, which returns the [`HostCopies`] of a device, the cache is on the host. `alike` are the caches of
    layers that keep the same tokens, in the order of the layers; this one is appended.
    """

    def __init__(
        self,
        num_slots: int,
        copies: Callable[[torch.device], HostCopies] | None = None,
        alike: list[KVCache] | None = None,
    ) -> None:
        self.num_slots, self.copies = num_slots, copies
        self.alike = [] if alike is None else alike
        self.alike.append(self)
        self.kv: Tensor | None = None
        self.grad: Tensor | None = None

    @property
    def following(self) -> KVCache | None:
        """Cache of the layer that runs next among those alike: the one before, during a backward pass."""
        index = self.alike.index(self) + (-1 if is_in_backward() else 1)
        return self.alike[index] if 0 <= index < len(self.alike) else None

    def zeros_like(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """
        Return zeros for keys and values, `(2, num_slots, kv_heads, head_dim)`; `x` is `(..., kv_heads, head_dim)`.
        """
        shape = (2, self.num_slots, *x.shape[-2:])
        if self.copies is None:
            return torch.zeros(shape, dtype=dtype, device=x.device)
        # From pinned memory, copies to a GPU run while the host goes on.
        pinned = x.device.type == "cuda" or x.is_pinned()
        return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=pinned)


@dataclass(frozen=True, slots=True, eq=False)
class FetchedSlots:
    """A range of a cache's slots on the device of the layer: a view of the cache, or a copy if it is offloaded."""

    first: int  # first slot
    kv: Tensor  # (2, num_fetched, kv_heads, head_dim): keys and values


@dataclass(frozen=True, slots=True, eq=False)
class KVCacheView:
    """One layer's cache while the layer runs over one row: what it reads, what it stores, where gradients go back."""

    cache: KVCache
    slots: LayerSlots

    def store(self, key: Tensor, value: Tensor) -> None:
        """Store the keys and values, `(row_length, kv_heads, head_dim)`, of tokens that later rows attend to."""
        cache, ranges = self.cache, self.slots.cached_for_later
        if not self.slots.stores or not ranges:
            return
        if cache.kv is None:
            cache.kv = cache.zeros_like(key, key.dtype)
        parts = [[x[first:last] for first, last, _ in ranges] for x in (key, value)]
        stored = torch.stack([x[0] if len(x) == 1 else torch.cat(x) for x in parts])
        held = cache.kv[:, self.slots.stored_by_row]
        if cache.copies is None:
            held.copy_(stored)
        else:
            cache.copies(key.device).send(stored, held)

    def fetch(self, first: int, last: int, device: torch.device) -> FetchedSlots:
        """Bring the slots `[first, last)` that a row attends to onto a device, all at once."""
        cache = self.cache
        assert cache.kv is not None, "ancestors ran before"
        kv = cache.kv[:, first:last]
        if cache.copies is None:
            return FetchedSlots(first, kv)
        copies, following = cache.copies(device), cache.following
        ahead = None if following is None or following.kv is None else following.kv[:, first:last]
        fetched = copies.fetch(kv, ahead, kind=id(cache.alike))
        if is_in_backward() and cache.grad is not None:
            copies.start_for_one_use(cache.grad[:, first:last])
        return FetchedSlots(first, fetched)

    def gradients_of(self, fetched: FetchedSlots) -> Tensor:
        """
        Return where a row adds the gradients of the slots that it fetched, which [`send_back`] takes afterwards.

        The gradients of keys and values, `(2, num_fetched, kv_heads, head_dim)`, are in float32 at least: every branch
        adds its own.
        """
        cache = self.cache
        if cache.grad is None:
            assert cache.kv is not None, "ancestors ran before"
            cache.grad = cache.zeros_like(cache.kv, torch.promote_types(cache.kv.dtype, torch.float32))
        stored = cache.grad[:, fetched.first : fetched.first + fetched.kv.shape[1]]
        return stored if cache.copies is None else cache.copies(fetched.kv.device).fetch_for_one_use(stored)

    def send_back(self, fetched: FetchedSlots, gradients: Tensor) -> None:
        """Send what [`gradients_of`] returned, with the gradients of the row, to an offloaded cache."""
        cache = self.cache
        if cache.copies is not None:
            assert cache.grad is not None, "`gradients_of` made it"
            stored = cache.grad[:, fetched.first : fetched.first + gradients.shape[1]]
            cache.copies(gradients.device).send(gradients, stored)

    def add_gradients(self, fetched: FetchedSlots, gradients: Tensor) -> None:
        """Add to the gradients of fetched slots, `(2, num_fetched, kv_heads, head_dim)` for keys and values."""
        self.send_back(fetched, self.gradients_of(fetched).add_(gradients))

    def add_gradients_from_later_rows(self, total: Tensor, index: Tensor | None = None) -> None:
        """
        Add the gradients that later rows sent back for the tokens of this row.

        Changes `total` in place, of shape `(2, row_length, kv_heads, head_dim)` for keys and values. `index` has the
        positions of the tokens that later rows attend to, shape `(num_cached,)`; not needed where they lie together.
        """
        cache = self.cache
        if cache.grad is None or not self.slots.cached_for_later:
            return
        sent = cache.grad[:, self.slots.stored_by_row]
        if cache.copies is not None:
            sent = cache.copies(total.device).fetch_for_one_use(sent)
        if index is not None:
            total.index_add_(1, index, sent)
            return
        start = 0
        for first, last, _ in self.slots.cached_for_later:
            total[:, first:last].add_(sent[:, start : start + last - first])
            start += last - first


def is_in_backward() -> bool:
    """Whether autograd calls, for a backward or for the recomputation of a checkpointed layer."""
    return torch._C._current_graph_task_id() != -1
