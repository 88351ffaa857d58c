"""States of a recurrent layer at the forks of a tree, instead of transformers' cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
        self.final: dict[StateName, torch.Tensor] = {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return the convolution's inputs just before the batch, shape `(batch, channels, kernel_size)`."""
        return self.initial.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return the recurrent state just before the batch, shape `(batch, ...)`."""
        return self.initial.get(("recurrent", state_idx))

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> torch.Tensor:
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
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: object
    ) -> torch.Tensor:
        """Store the recurrent state after the batch, shape `(batch, ...)`."""
        self.final["recurrent", state_idx] = recurrent_states
        return recurrent_states

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether the cache can be rolled back: no."""
        return False


def _concatenate(sources: Sequence[ForkStates]) -> dict[StateName, torch.Tensor]:
    if not sources:
        return {}
    if len(sources) == 1:
        return sources[0].final
    return {name: torch.cat([source.final[name] for source in sources]) for name in sources[0].final}
