"""
A schedule as index tensors: from the row to batches of pieces, and back.

The row of [`schedule`] has 11 tokens. With `path_schedule`, its batches have shapes `(2, 7)` and `(1, 4)`:

    gather_index     0 1 2 3 4 5 6   0 1 2 3 7 8 8   0 1 9 10       the second piece is padded with its last token
    scatter_index    0 1 2 3 4 5 6   11 12           16 17          where tokens 0-6, 7-8 and 9-10 are in gather_index

Tokens 0-3 of the second piece and 0-1 of the third are replayed: the row takes their outputs from the first piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..attention.tree_mask import TreeMask
from .schedule import Schedule
from .states import RowBoundary


@dataclass(eq=False)
class Layout:
    """Where each token of a row goes when a layer runs over it in pieces, padded with the last token of each."""

    length: int  # number of tokens of the row
    schedule: Schedule
    device: torch.device  # device of the layer's inputs
    boundary: RowBoundary | None = None  # what the layers take from other rows and leave for them
    # Fewest tokens that run after a state: a layer takes a single one for a generation step, which has no gradients.
    shortest: int = 2

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """Shape `(num_pieces, num_tokens)` of each batch, padding included."""
        longest = [self.schedule.pieces[batch[0]] for batch in self.schedule.batches]
        lengths = [max(piece.length, self.shortest) if piece.starts_from_state else piece.length for piece in longest]
        return list(zip(map(len, self.schedule.batches), lengths, strict=True))

    @property
    def num_inputs(self) -> int:
        """Number of tokens whose inputs the layer gets: those of the row, and stored ones of other rows."""
        return self.length + (0 if self.boundary is None else self.boundary.num_outside)

    @property
    def gather_index(self) -> Tensor:
        """Index into the layer's inputs of each token of all batches, shape `(num_batched_tokens,)`."""
        return self._indices[0]

    @property
    def scatter_index(self) -> Tensor:
        """Index into `gather_index` of each token of the row, shape `(row_length,)`."""
        return self._indices[1]

    @cached_property
    def _indices(self) -> tuple[Tensor, ...]:
        """Both indices, moved to the device in one copy."""
        positions: list[NDArray[np.int64]] = []
        scatter = np.empty(self.length, np.int64)
        offset = 0
        for batch, (_, length) in zip(self.schedule.batches, self.shapes, strict=True):
            for index in batch:
                piece = self.schedule.pieces[index]
                own = np.concatenate([np.arange(first, last) for first, last in piece.ranges])
                positions.append(np.pad(own, (0, length - len(own)), mode="edge"))
                start, end = piece.ranges[-1]
                scatter[start:end] = np.arange(offset + piece.num_replayed, offset + piece.length)
                offset += length
        gather = np.concatenate(positions)
        if self.boundary is not None:
            gather = self.boundary.locate(gather)
        both = torch.from_numpy(np.concatenate([gather, scatter])).to(self.device, non_blocking=True)
        return torch.split(both, [len(gather), len(scatter)])

    def gather(self, value: object) -> list[object]:
        """Split an argument, tensors `(1, num_inputs, ...)`, into one per batch, `(num_pieces, num_tokens, ...)`."""
        if isinstance(value, dict):
            parts = [self.gather(part) for part in value.values()]
            return [dict(zip(value, step, strict=True)) for step in zip(*parts, strict=True)]
        if isinstance(value, tuple):
            return list(zip(*(self.gather(part) for part in value), strict=True))
        if isinstance(value, Tensor) and value.shape[1:3] == (1, self.num_inputs):  # positions of several dimensions
            return [torch.stack(parts) for parts in zip(*map(self.gather, value.unbind()), strict=True)]
        if not isinstance(value, Tensor) or value.shape[:2] != (1, self.num_inputs):
            return [value] * len(self.shapes)
        tokens: Tensor = value.squeeze(0)
        if any(piece.num_replayed for piece in self.schedule.pieces):
            tokens = SelectRepeatedly.apply(tokens, self.gather_index)  # type: ignore[no-untyped-call]
        else:
            tokens = tokens.index_select(0, self.gather_index)
        batches = torch.split(tokens, [sequences * length for sequences, length in self.shapes])
        return [batch.reshape(*shape, *batch.shape[1:]) for batch, shape in zip(batches, self.shapes, strict=True)]

    def scatter(self, outputs: Sequence[Any]) -> Any:
        """Put outputs of all batches in the order of the row; what has no entry per token (states) becomes `None`."""
        if isinstance(outputs[0], tuple):
            return tuple(self.scatter(parts) for parts in zip(*outputs, strict=True))
        if not all(
            isinstance(output, Tensor) and output.shape[:2] == shape
            for output, shape in zip(outputs, self.shapes, strict=True)
        ):
            return None
        return torch.cat([output.flatten(0, 1) for output in outputs]).index_select(0, self.scatter_index)[None]

    def distances(self) -> list[Tensor]:
        """Return how far behind each other the tokens of a path are, per batch, shape `(num_tokens, num_tokens)`."""
        positions = [torch.arange(length, device=self.device) for _, length in self.shapes]
        return [position[:, None] - position[None, :] for position in positions]

    def masks(self, mask: TreeMask, dtype: torch.dtype | None) -> list[Tensor]:
        """Return a mask `(num_pieces, 1, num_tokens, num_tokens)` per batch: boolean, or to be added in a dtype."""
        masks = []
        for pieces, length in self.shapes:
            depth = torch.arange(length, device=self.device)
            visible = mask.evaluate(depth, depth)[None, None]
            if dtype is not None:
                floor = torch.finfo(dtype).min
                visible = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, floor)
            masks.append(visible.expand(pieces, -1, -1, -1))
        return masks


class SelectRepeatedly(torch.autograd.Function):
    """Select tokens, some several times; gradients of one add up in float32, without the sort of indexing by `[]`."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor) -> Tensor:
        """Return the selected tokens."""
        ctx.save_for_backward(index)
        ctx.shape = tokens.shape
        return tokens.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the sum of each token's gradients."""
        (index,) = ctx.saved_tensors
        grad = grads[0].to(torch.promote_types(grads[0].dtype, torch.float32))
        return grad.new_zeros(ctx.shape).index_add_(0, index, grad).to(grads[0].dtype), None
