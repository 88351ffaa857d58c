"""Keys and values of tokens that ran before, and the gradients that later tokens send back to them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray


HandedOn = tuple[tuple[int, int, int], ...]
"""Ranges `[first, last)` of a row with the slot of their first token in the memory."""


class LayerMemory:
    """
    Keys and values of one attention layer that later rows attend to, one slot per token.

    Args:
        num_slots (`int`):
            Number of tokens that are handed on.
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

    def like(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return zeros with one slot per token, shape `(1, kv_heads, num_slots, head_dim)`."""
        shape = (*x.shape[:2], self.num_slots, x.shape[3])
        return torch.zeros(shape, dtype=dtype, device="cpu" if self.offload else x.device)


@dataclass(frozen=True, slots=True)
class MemoryAccess:
    """
    What one layer reads from its memory, writes to it, and sends back while it runs over one row.

    Args:
        memory (`LayerMemory`):
            Memory of the layer.
        handed_on (`HandedOn`):
            Tokens of the row that later rows attend to.
        writes (`bool`):
            Whether the row runs for the first time, so that the memory does not hold these tokens yet.
        kept (`numpy.ndarray` of `numpy.int64`):
            For each slot of the layer, the slot among the tokens that any layer keeps: those that a window looks back
            to, or all.
    """

    memory: LayerMemory
    handed_on: HandedOn
    writes: bool
    kept: NDArray[np.int64]

    @classmethod
    def to(cls, memory: LayerMemory, handed_on: HandedOn, kept: NDArray[np.int64], *, writes: bool) -> MemoryAccess:
        """
        Return the access of a layer.

        Args:
            memory (`LayerMemory`):
                Memory of the layer, with as many slots as are kept.
            handed_on (`HandedOn`):
                Tokens of the row that any later row attends to, in any layer.
            kept (`numpy.ndarray` of `numpy.int64`):
                Slots of which this layer keeps anything, sorted.
            writes (`bool`):
                Whether the row runs for the first time.
        """
        own: list[tuple[int, int, int]] = []
        for first, last, slot in handed_on:
            start, end = np.searchsorted(kept, (slot, slot + last - first)).tolist()
            borders = [start, *(np.flatnonzero(np.diff(kept[start:end]) > 1) + start + 1).tolist(), end]
            for begin, stop in pairwise(borders if start < end else []):
                position = first + int(kept[begin]) - slot
                own.append((position, position + stop - begin, begin))
        return cls(memory, tuple(own), writes, kept)

    def places(self, ranges: tuple[tuple[int, int], ...], row_length: int) -> tuple[tuple[int, int], ...]:
        """
        Return where keys lie: positions of the row as they are, those after it as slots of this layer.

        Args:
            ranges (`tuple[tuple[int, int], ...]`):
                Half-open ranges of positions; those from `row_length` on are slots among all.
            row_length (`int`):
                Number of tokens of the row.
        """
        placed = []
        for first, last in ranges:
            if first >= row_length:
                place = int(np.searchsorted(self.kept, first - row_length))
                assert self.kept[place + last - first - 1] == last - 1 - row_length, (
                    "a window looks back to what is kept"
                )
                first, last = row_length + place, row_length + place + last - first
            placed.append((first, last))
        return tuple(placed)

    @property
    def key(self) -> torch.Tensor | None:
        """Keys of shape `(1, kv_heads, num_slots, head_dim)`."""
        return self.memory.key

    @property
    def value(self) -> torch.Tensor | None:
        """Values of shape `(1, kv_heads, num_slots, head_dim)`."""
        return self.memory.value

    @property
    def grad_key(self) -> torch.Tensor | None:
        """Gradients of the keys so far, in float32 at least: history gets them from every branch."""
        memory = self.memory
        if memory.grad_key is None and memory.key is not None:
            memory.grad_key = memory.like(memory.key, torch.promote_types(memory.key.dtype, torch.float32))
        return memory.grad_key

    @property
    def grad_value(self) -> torch.Tensor | None:
        """Gradients of the values so far."""
        memory = self.memory
        if memory.grad_value is None and memory.value is not None:
            memory.grad_value = memory.like(memory.value, torch.promote_types(memory.value.dtype, torch.float32))
        return memory.grad_value

    def remember(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """
        Keep the keys and values that later rows attend to.

        Args:
            key (`torch.Tensor` of shape `(1, kv_heads, row_length, head_dim)`):
                Keys of the row.
            value (`torch.Tensor` of shape `(1, kv_heads, row_length, head_dim)`):
                Values of the row.
        """
        memory = self.memory
        if not self.writes or not self.handed_on:
            return
        if memory.key is None or memory.value is None:
            memory.key, memory.value = memory.like(key, key.dtype), memory.like(value, value.dtype)
        for first, last, slot in self.handed_on:
            memory.key[:, :, slot : slot + last - first] = key[:, :, first:last]
            memory.value[:, :, slot : slot + last - first] = value[:, :, first:last]

    def collect(self, grad_key: torch.Tensor, grad_value: torch.Tensor) -> None:
        """
        Add what later rows sent back for the tokens of this row.

        Args:
            grad_key (`torch.Tensor` of shape `(1, kv_heads, row_length, head_dim)`):
                Gradient of the row's keys, changed in place.
            grad_value (`torch.Tensor` of shape `(1, kv_heads, row_length, head_dim)`):
                Gradient of the row's values, changed in place.
        """
        for own, sent_back in ((grad_key, self.memory.grad_key), (grad_value, self.memory.grad_value)):
            if sent_back is not None:
                for first, last, slot in self.handed_on:
                    own[:, :, first:last] += sent_back[:, :, slot : slot + last - first].to(own.device)
