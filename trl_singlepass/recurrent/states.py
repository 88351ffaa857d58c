"""
States of recurrent layers at the forks of a tree, and what of a layer crosses from row to row.

Inside a row, autograd follows a state from fork to branch ([`ForkStates`]). Between rows, tensors are detached from
the graph of the row that made them. Gradients cross this cut by hand: later rows add theirs to [`BoundaryTensors`],
and the backward of the row that made the tensors collects them. Rows therefore run backward from the last to the
first. The functions below are the places where a layer's graph meets the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


StateName = tuple[str, int]
"""`("conv", i)` or `("recurrent", i)`: kind of a state and its index among the layer's states of that kind."""


class ForkStates:
    """
    Stands in for a layer's cache while the layer runs over one batch of pieces.

    It answers the calls that transformers' layers make to `Cache`, but keeps states as they are computed. A cache
    copies them into its own buffers, which cuts off their gradients.

    `sources` are the states that each piece of the batch starts from; none at the start of a sample.
    """

    def __init__(self, sources: Sequence[ForkStates] = ()) -> None:
        self.initial = _concatenate(sources)
        self.final: dict[StateName, Tensor] = {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the convolution's inputs just before the batch, shape `(batch, channels, kernel_size)`."""
        return self.initial.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the recurrent state just before the batch, shape `(batch, ...)`."""
        return self.initial.get(("recurrent", state_idx))

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> Tensor:
        """Store the convolution's inputs, shape `(batch, channels, length)`, and return them after those before."""
        kernel_size = conv_kernel_size or conv_states.shape[-1]
        before = self.get_conv_state(layer_idx, state_idx)
        if before is not None:
            conv_states = torch.cat([before, conv_states], dim=-1)
        elif conv_states.shape[-1] < kernel_size:
            conv_states = F.pad(conv_states, (kernel_size - conv_states.shape[-1], 0))
        self.final["conv", state_idx] = conv_states[..., -kernel_size:]
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: object
    ) -> Tensor:
        """Store the recurrent state after the batch, shape `(batch, ...)`."""
        self.final["recurrent", state_idx] = recurrent_states
        return recurrent_states

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether the cache can be rolled back: no."""
        return False


def _concatenate(sources: Sequence[ForkStates]) -> dict[StateName, Tensor]:
    if not sources:
        return {}
    if len(sources) == 1:
        return sources[0].final
    return {name: torch.cat([source.final[name] for source in sources]) for name in sources[0].final}


class StateKey(NamedTuple):
    """Key of a state."""

    slot: int  # slot of the token after which the state holds
    name: StateName


InputKey = tuple[str | int, ...]
"""Path to an input in a layer's arguments: `("position_embeddings", 0)` is the first entry of that tuple."""

Key = InputKey | StateKey


@dataclass(eq=False)
class BoundaryTensors:
    """Inputs and states of one layer that cross from row to row, with the gradients that later rows send back."""

    offload: bool = False  # whether to hold them on the CPU
    # Detached. Inputs have shape `(1, num_inputs, ...)`, states `(1, ...)`.
    values: dict[Key, Tensor] = field(default_factory=dict)
    # Those so far, at least in float32: every branch adds to those of the history.
    gradients: dict[Key, Tensor] = field(default_factory=dict)

    def store(self, key: Key, value: Tensor) -> None:
        """Store a tensor."""
        self.values[key] = value.detach().to("cpu" if self.offload else value.device)

    def add_gradient(self, key: Key, gradient: Tensor) -> None:
        """Add to the gradient of a tensor."""
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


class AppendDetachedInputs(torch.autograd.Function):
    """
    Append the stored inputs of tokens outside the row, to `(1, row_length + num_inputs, ...)`.

    Tokens of the row that later rows replay have `positions` in the row and `places` among the stored inputs, both of
    shape `(num_stored_by_row,)`, on the device of what they index.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, tensors: BoundaryTensors, key: InputKey, positions: Tensor, places: Tensor
    ) -> Tensor:
        """Concatenate both."""
        ctx.tensors, ctx.key, ctx.length, ctx.positions, ctx.places = tensors, key, value.shape[1], positions, places
        return torch.cat([value, tensors.values[key].to(value.device)], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Send gradients to earlier rows, and add what later rows sent to the gradients of this one."""
        own, outside = grads[0][:, : ctx.length], grads[0][:, ctx.length :]
        tensors: BoundaryTensors = ctx.tensors
        from_later_rows = tensors.gradients.get(ctx.key)
        if from_later_rows is not None and len(ctx.places):
            own = own.clone()
            own[:, ctx.positions] += from_later_rows[:, ctx.places].to(own)
        tensors.add_gradient(ctx.key, outside)
        return own, None, None, None, None


class LoadState(torch.autograd.Function):
    """Load the state after a token of an earlier row, to the device of any tensor that requires gradients."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensors: BoundaryTensors, key: StateKey) -> Tensor:
        """Return the state."""
        ctx.tensors, ctx.key = tensors, key
        return tensors.values[key].detach().to(anchor.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        """Send the gradient to the earlier row."""
        ctx.tensors.add_gradient(ctx.key, grads[0])
        return None, None, None


class CollectStateGradients(torch.autograd.Function):
    """Tie the states that a row stored to its layer's output, so that one backward goes through both."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, tensors: BoundaryTensors, keys: Sequence[StateKey], *states: Tensor
    ) -> Tensor:
        """Return the output."""
        ctx.tensors, ctx.keys = tensors, keys
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the output, and those that later rows sent for the states."""
        sent = [ctx.tensors.gradients.get(key) for key in ctx.keys]
        dtypes = [ctx.tensors.values[key].dtype for key in ctx.keys]
        own = [None if x is None else x.to(grads[0].device, d) for x, d in zip(sent, dtypes, strict=True)]
        return grads[0], None, None, *own
