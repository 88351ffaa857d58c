"""A schedule as index tensors: from the row to the batches of pieces, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..attention.tree_mask import TreeMask
from .boundary import Handover
from .schedule import Piece, Schedule


@dataclass(eq=False)
class Layout:
    """
    Where each token of a row goes when a layer runs over the row in pieces.

    Batches are padded on the right with the last token of each piece: what follows a token does not change its output.

    Args:
        length (`int`):
            Number of tokens of the row.
        schedule (`Schedule`):
            Pieces and batches.
        device (`torch.device`):
            Device of the layer's inputs.
        handover (`Handover`, *optional*):
            What the layers need of earlier rows and leave for later ones.
    """

    length: int
    schedule: Schedule
    device: torch.device
    handover: Handover | None = None

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """Number of pieces and of tokens per piece of each batch."""
        return [(len(batch), self._length(batch)) for batch in self.schedule.batches]

    def _length(self, batch: Sequence[int]) -> int:
        length = self.schedule.pieces[batch[0]].length
        # A single token on top of a state would be taken for a step of generation, which has no gradients.
        return max(length, 2) if self.schedule.pieces[batch[0]].starts_from_state else length

    @property
    def num_inputs(self) -> int:
        """Number of tokens whose inputs the layer gets: those of the row, and what is kept of earlier rows."""
        return self.length + (0 if self.handover is None else len(self.handover.kept.inputs))

    @cached_property
    def into_batches(self) -> torch.Tensor:
        """Row position of each token of all batches, one after the other, shape `(num_batched_tokens,)`."""
        parts = [
            _padded(self.schedule.pieces[index], length)
            for batch, (_, length) in zip(self.schedule.batches, self.shapes, strict=True)
            for index in batch
        ]
        positions = np.concatenate(parts)
        places = positions if self.handover is None else self.handover.place_of(positions)
        return torch.from_numpy(places).to(self.device)

    @cached_property
    def into_row(self) -> torch.Tensor:
        """For each token of the row, its place in `into_batches`, shape `(row_length,)`."""
        places = np.empty(self.length, np.int64)
        offset = 0
        for batch, (_, length) in zip(self.schedule.batches, self.shapes, strict=True):
            for index in batch:
                piece = self.schedule.pieces[index]
                start, end = piece.ranges[-1]  # the ranges before it are run again, and theirs is another piece
                places[start:end] = np.arange(offset + piece.num_warmup, offset + piece.length)
                offset += length
        return torch.from_numpy(places).to(self.device)

    def gather(self, value: Any) -> list[Any]:
        """
        Cut an argument of a layer into one per batch.

        Args:
            value (`Any`):
                A tensor with one entry per token, shape `(1, num_inputs, ...)`, or a tuple or
                dictionary of such; anything else goes to every batch as it is.

        Returns:
            `list`: One value per batch; tensors have shape `(num_pieces, num_tokens, ...)`.
        """
        if isinstance(value, dict):
            parts = [self.gather(part) for part in value.values()]
            return [dict(zip(value, step, strict=True)) for step in zip(*parts, strict=True)]
        if isinstance(value, tuple):
            return list(zip(*(self.gather(part) for part in value), strict=True))
        if not isinstance(value, torch.Tensor) or value.shape[:2] != (1, self.num_inputs):
            return [value] * len(self.shapes)
        batches = torch.split(value[0, self.into_batches], [pieces * tokens for pieces, tokens in self.shapes])
        return [batch.reshape(*shape, *batch.shape[1:]) for batch, shape in zip(batches, self.shapes, strict=True)]

    def scatter(self, outputs: Sequence[Any]) -> Any:
        """
        Put the outputs of all batches in the row's order.

        Args:
            outputs (`Sequence`):
                What the layer returned for each batch: a tensor with one entry per token, or a tuple.

        Returns:
            `Any`: The same for the row; `None` in place of what has no entry per token (states, attention weights).
        """
        if isinstance(outputs[0], tuple):
            return tuple(self.scatter(parts) for parts in zip(*outputs, strict=True))
        if not all(
            isinstance(output, torch.Tensor) and output.shape[:2] == shape
            for output, shape in zip(outputs, self.shapes, strict=True)
        ):
            return None
        return torch.cat([output.flatten(0, 1) for output in outputs])[self.into_row][None]

    def distances(self) -> list[torch.Tensor]:
        """How far each token of a path is behind each other one, per batch, shape `(num_tokens, num_tokens)`."""
        positions = [torch.arange(length, device=self.device) for _, length in self.shapes]
        return [position[:, None] - position[None, :] for position in positions]

    def masks(self, mask: TreeMask, dtype: torch.dtype | None) -> list[torch.Tensor]:
        """
        Masks of a layer that attends over whole paths, one per batch.

        Args:
            mask (`TreeMask`):
                Rule of the layer.
            dtype (`torch.dtype`, *optional*):
                If set, masks are added to scores of this dtype, as eager attention does; boolean otherwise.

        Returns:
            `list[torch.Tensor]`: Masks of shape `(num_pieces, 1, num_tokens, num_tokens)`.
        """
        masks = []
        for pieces, length in self.shapes:
            depth = torch.arange(length, device=self.device)
            visible = mask.evaluate(depth, depth)[None, None]
            if dtype is not None:
                floor = torch.finfo(dtype).min
                visible = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, floor)
            masks.append(visible.expand(pieces, -1, -1, -1))
        return masks


def _padded(piece: Piece, length: int) -> np.ndarray:
    positions = np.concatenate([np.arange(start, end) for start, end in piece.ranges])
    return np.pad(positions, (0, length - len(positions)), mode="edge")
