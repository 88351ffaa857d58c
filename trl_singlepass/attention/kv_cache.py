"""Keys and values of tokens that ran before, and the gradients that later tokens send back to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from ..trees.rows import Ranges


SlotRanges = tuple[tuple[int, int, int], ...]
"""Ranges `[first, last)` of a row, each with the slot of its first token in a cache."""


class KVCache:
    """
    Keys and values of one attention layer that later rows attend to, one slot per token.

    Args:
        num_slots (`int`):
            Number of tokens that later rows attend to.
        offload (`bool`, *optional*, defaults to `False`):
            Whether to hold them on the CPU; attention copies what it reads to its own device.
    """

    def __init__(self, num_slots: int, offload: bool = False) -> None:
        self.num_slots = num_slots
        self.offload = offload
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None
        self.grad_key: torch.Tensor | None = None
        self.grad_value: torch.Tensor | None = None

    def zeros_like(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return zeros with one slot per token, shape `(1, kv_heads, num_slots, head_dim)`."""
        shape = (*x.shape[:2], self.num_slots, x.shape[3])
        if not self.offload:
            return torch.zeros(shape, dtype=dtype, device=x.device)
        # From pinned memory, copies to a GPU run while the host goes on.
        pinned = x.device.type == "cuda" or x.is_pinned()
        return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=pinned)

    def zero_gradient(self, x: torch.Tensor) -> torch.Tensor:
        """Return zeros for the gradient of keys or values, in float32 at least: history gets it from every branch."""
        return self.zeros_like(x, torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, slots=True, eq=False)
class FetchedSlots:
    """
    A range of a cache's slots on the device of the layer: views of the cache, or copies if it is offloaded.

    Args:
        first (`int`):
            First slot.
        key (`torch.Tensor` of shape `(1, kv_heads, num_fetched, head_dim)`):
            Keys.
        value (`torch.Tensor` of shape `(1, kv_heads, num_fetched, head_dim)`):
            Values.
    """

    first: int
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class KVCacheView:
    """
    One layer's cache while the layer runs over one row: what it reads, what it stores, where gradients go back.

    Args:
        cache (`KVCache`):
            Cache of the layer.
        handed_on (`SlotRanges`):
            Tokens of the row that later rows attend to, with their slots in this layer's cache.
        stores (`bool`):
            Whether the row runs for the first time, so that the cache does not hold these tokens yet.
        kept (`numpy.ndarray` of `numpy.int64`):
            For each slot of this layer, its number among the slots that any layer keeps. A full layer keeps them all,
            a window only those it looks back to.
    """

    cache: KVCache
    handed_on: SlotRanges
    stores: bool
    kept: NDArray[np.int64]

    @classmethod
    def for_layer(cls, cache: KVCache, handed_on: SlotRanges, kept: NDArray[np.int64], *, stores: bool) -> KVCacheView:
        """
        Return the view of a layer that keeps only some slots.

        Tokens 10 to 15 of a row have the slots 4 to 9. A layer that keeps the slots 2, 6, 7 and 9 has them as its own
        slots 0 to 3, so what it hands on is `((12, 14, 1), (15, 16, 3))`: tokens 12 and 13 from its slot 1 on, token
        15 in its slot 3.

        Args:
            cache (`KVCache`):
                Cache of the layer, with as many slots as are kept.
            handed_on (`SlotRanges`):
                Tokens of the row that any later row attends to, in any layer.
            kept (`numpy.ndarray` of `numpy.int64`):
                Slots that this layer keeps, sorted.
            stores (`bool`):
                Whether the row runs for the first time.
        """
        own: list[tuple[int, int, int]] = []
        for first, last, slot in handed_on:
            start, end = np.searchsorted(kept, (slot, slot + last - first)).tolist()
            borders = [start, *(np.flatnonzero(np.diff(kept[start:end]) > 1) + start + 1).tolist(), end]
            for begin, stop in pairwise(borders if start < end else []):
                position = first + int(kept[begin]) - slot
                own.append((position, position + stop - begin, begin))
        return cls(cache, tuple(own), stores, kept)

    def locate(self, ranges: Ranges, row_length: int) -> Ranges:
        """
        Return where the keys of this layer lie: positions in the row stay, those past it become slots of the layer.

        In a row of 20 tokens, position 26 is slot 6. The layer of the example above holds it in its own slot 1, so
        `((26, 28), (0, 20))` becomes `((21, 23), (0, 20))`.

        Args:
            ranges (`Ranges`):
                Half-open ranges of positions; from `row_length` on, they are slots among those that any layer keeps.
            row_length (`int`):
                Number of tokens of the row.
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

    @property
    def key(self) -> torch.Tensor | None:
        """Keys of shape `(1, kv_heads, num_slots, head_dim)`."""
        return self.cache.key

    @property
    def value(self) -> torch.Tensor | None:
        """Values of shape `(1, kv_heads, num_slots, head_dim)`."""
        return self.cache.value

    @property
    def grad_key(self) -> torch.Tensor | None:
        """Gradients of the keys so far."""
        cache = self.cache
        if cache.grad_key is None and cache.key is not None:
            cache.grad_key = cache.zero_gradient(cache.key)
        return cache.grad_key

    @property
    def grad_value(self) -> torch.Tensor | None:
        """Gradients of the values so far."""
        cache = self.cache
        if cache.grad_value is None and cache.value is not None:
            cache.grad_value = cache.zero_gradient(cache.value)
        return cache.grad_value

    def store(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """
        Store the keys and values that later rows attend to, unless the cache holds them already.

        Args:
            key (`torch.Tensor` of shape `(1, kv_heads, row_length, head_dim)`):
                Keys of the row.
            value (`torch.Tensor` of shape `(1, kv_heads, row_length, head_dim)`):
                Values of the row.
        """
        cache = self.cache
        if not self.stores or not self.handed_on:
            return
        if cache.key is None or cache.value is None:
            cache.key, cache.value = cache.zeros_like(key, key.dtype), cache.zeros_like(value, value.dtype)
        for first, last, slot in self.handed_on:
            cache.key[:, :, slot : slot + last - first] = key[:, :, first:last]
            cache.value[:, :, slot : slot + last - first] = value[:, :, first:last]

    def fetch(self, ranges: Iterable[tuple[int, int]], row_length: int, device: torch.device) -> FetchedSlots | None:
        """
        Bring the slots that a row attends to onto a device, all at once.

        Args:
            ranges (`Iterable[tuple[int, int]]`):
                Half-open ranges of positions, as [`locate`] returns them; those below `row_length` are of the row.
            row_length (`int`):
                Number of tokens of the row.
            device (`torch.device`):
                Device of the layer's tensors.

        Returns:
            `FetchedSlots`, *optional*: The slots from the first to the last; `None` if the row attends to none.
        """
        slots = [(first - row_length, last - row_length) for first, last in ranges if first >= row_length]
        if not slots:
            return None
        first, last = min(slots)[0], max(last for _, last in slots)
        assert self.key is not None, "ancestors ran before"
        assert self.value is not None, "ancestors ran before"
        key, value = (_copy(x[:, :, first:last], device, self.cache.offload) for x in (self.key, self.value))
        return FetchedSlots(first, key, value)

    def gradients_of(self, fetched: FetchedSlots) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return where a row adds the gradients of the slots that it fetched, which [`send_back`] takes afterwards.

        Args:
            fetched (`FetchedSlots`):
                Slots that the row attends to.
        """
        assert self.grad_key is not None, "ancestors ran before"
        assert self.grad_value is not None, "ancestors ran before"
        here = slice(fetched.first, fetched.first + fetched.key.shape[2])
        stored = self.grad_key[:, :, here], self.grad_value[:, :, here]
        if not self.cache.offload:
            return stored
        return tuple(torch.zeros_like(x, device=fetched.key.device) for x in stored)  # type: ignore[return-value]

    def send_back(self, fetched: FetchedSlots, grad_key: torch.Tensor, grad_value: torch.Tensor) -> None:
        """
        Add the gradients of fetched slots to those of an offloaded cache; without offloading they are there already.

        Args:
            fetched (`FetchedSlots`):
                Slots that the row attends to.
            grad_key (`torch.Tensor`):
                Gradient of the keys, from [`gradients_of`].
            grad_value (`torch.Tensor`):
                Gradient of the values, from [`gradients_of`].
        """
        if not self.cache.offload:
            return
        assert self.grad_key is not None, "`gradients_of` made them"
        assert self.grad_value is not None, "`gradients_of` made them"
        here = slice(fetched.first, fetched.first + fetched.key.shape[2])
        self.grad_key[:, :, here] += grad_key.to(self.grad_key.device)
        self.grad_value[:, :, here] += grad_value.to(self.grad_value.device)

    def add_gradients_from_later_rows(self, grad_key: torch.Tensor, grad_value: torch.Tensor) -> None:
        """
        Add the gradients that later rows sent back for the tokens of this row.

        Args:
            grad_key (`torch.Tensor` of shape `(1, kv_heads, row_length, head_dim)`):
                Gradient of the row's keys, changed in place.
            grad_value (`torch.Tensor` of shape `(1, kv_heads, row_length, head_dim)`):
                Gradient of the row's values, changed in place.
        """
        for own, sent_back in ((grad_key, self.cache.grad_key), (grad_value, self.cache.grad_value)):
            if sent_back is not None:
                for first, last, slot in self.handed_on:
                    own[:, :, first:last] += sent_back[:, :, slot : slot + last - first].to(own.device)


def _copy(x: torch.Tensor, device: torch.device, offloaded: bool) -> torch.Tensor:
    if not offloaded:
        return x
    copied = torch.empty(x.shape, dtype=x.dtype, device=device)
    # Head by head, because only contiguous memory is copied without a detour and without the host waiting.
    for own, stored in zip(copied.unbind(1), x.unbind(1), strict=True):
        own.copy_(stored, non_blocking=True)
    return copied
