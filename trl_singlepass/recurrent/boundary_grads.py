"""Tensors that a recurrent layer leaves for later rows, as leaves of their graphs: gradients come back here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


Key = tuple[Any, ...]


@dataclass(eq=False)
class Leaves:
    """
    Tensors of one layer by name, with the gradients that later rows send back.

    Args:
        offload (`bool`, *optional*, defaults to `False`):
            Whether to hold them on the CPU.
        values (`dict[tuple, torch.Tensor]`, *optional*):
            The tensors.
        gradients (`dict[tuple, torch.Tensor]`, *optional*):
            Their gradients so far, in float32 at least: history gets them from every branch.
    """

    offload: bool = False
    values: dict[Key, torch.Tensor] = field(default_factory=dict)
    gradients: dict[Key, torch.Tensor] = field(default_factory=dict)

    def keep(self, key: Key, value: torch.Tensor) -> None:
        """Keep a tensor under a name."""
        self.values[key] = value.detach().to("cpu" if self.offload else value.device)

    def send_back(self, key: Key, gradient: torch.Tensor) -> None:
        """Add a gradient of a tensor."""
        if key not in self.gradients:
            value = self.values[key]
            dtype = torch.promote_types(value.dtype, torch.float32)
            self.gradients[key] = torch.zeros_like(value, dtype=dtype)
        self.gradients[key] += gradient.to(self.gradients[key].device)

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors and gradients."""
        held = (*self.values.values(), *self.gradients.values())
        return sum(x.numel() * x.element_size() for x in held)


class WithKept(torch.autograd.Function):
    """Inputs of the row, followed by those that are kept of tokens outside of it."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, leaves: Leaves, key: Key, positions: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """
        Join them.

        Args:
            ctx (`Any`):
                Autograd context.
            value (`torch.Tensor` of shape `(1, length, ...)`):
                Inputs of the row.
            leaves (`Leaves`):
                What is kept for the layer.
            key (`tuple`):
                Name of the inputs.
            positions (`torch.Tensor` of shape `(num_kept,)`, `torch.int64`):
                Tokens of the row that are kept.
            places (`torch.Tensor` of shape `(num_kept,)`, `torch.int64`):
                Where they stand among all that are kept.

        Returns:
            `torch.Tensor` of shape `(1, length + num_places, ...)`: All inputs.
        """
        ctx.leaves, ctx.key, ctx.length, ctx.positions, ctx.places = leaves, key, value.shape[1], positions, places
        return torch.cat([value, leaves.values[key].to(value.device)], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """
        Send gradients back to rows before this one, and add to its own what rows after it sent back.

        Args:
            ctx (`Any`):
                Autograd context.
            *grads (`torch.Tensor` of shape `(1, length + num_places, ...)`):
                Gradient of all inputs.
        """
        own, outside = grads[0][:, : ctx.length], grads[0][:, ctx.length :]
        leaves: Leaves = ctx.leaves
        sent_back = leaves.gradients.get(ctx.key)
        if sent_back is not None and len(ctx.places):
            own = own.clone()
            own[:, ctx.positions.to(own.device)] += sent_back[:, ctx.places.to(sent_back.device)].to(own)
        leaves.send_back(ctx.key, outside)
        return own, None, None, None, None


class Recalled(torch.autograd.Function):
    """A kept tensor as an input of the row."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, leaves: Leaves, key: Key) -> torch.Tensor:
        """
        Return it.

        Args:
            ctx (`Any`):
                Autograd context.
            anchor (`torch.Tensor`):
                Any tensor that requires gradients, on the device where the result is needed.
            leaves (`Leaves`):
                What is kept for the layer.
            key (`tuple`):
                Name of the tensor.
        """
        ctx.leaves, ctx.key = leaves, key
        return leaves.values[key].detach().to(anchor.device)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        """
        Send its gradient back.

        Args:
            ctx (`Any`):
                Autograd context.
            *grads (`torch.Tensor`):
                Gradient of the tensor.
        """
        ctx.leaves.send_back(ctx.key, grads[0])
        return None, None, None


class LeavingStates(torch.autograd.Function):
    """The output of a row, whose backward also sends back what came for tensors that the row left for later ones."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, leaves: Leaves, keys: Sequence[Key], *tensors: torch.Tensor
    ) -> torch.Tensor:
        """
        Return the output.

        Args:
            ctx (`Any`):
                Autograd context.
            output (`torch.Tensor`):
                Output of the layer.
            leaves (`Leaves`):
                What is kept for the layer.
            keys (`Sequence[tuple]`):
                Names of the tensors that are handed on.
            *tensors (`torch.Tensor`):
                These tensors.
        """
        ctx.leaves, ctx.keys = leaves, keys
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """
        Return the gradients of the output and of the tensors.

        Args:
            ctx (`Any`):
                Autograd context.
            *grads (`torch.Tensor`):
                Gradient of the output.
        """
        sent_back = [ctx.leaves.gradients.get(key) for key in ctx.keys]
        dtypes = [ctx.leaves.values[key].dtype for key in ctx.keys]
        own = [None if x is None else x.to(grads[0].device, d) for x, d in zip(sent_back, dtypes, strict=True)]
        return grads[0], None, None, *own
