"""States of a recurrent layer at the forks of a tree, in the place of transformers' cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F


class ForkStates:
    """
    What a layer reads and writes instead of a cache while it runs over one batch of pieces.

    It answers the calls that the layers of transformers make to `Cache`, but keeps states as they are computed: a
    cache copies them into buffers of its own, which ends their gradients.

    Args:
        sources (`Sequence[ForkStates]`, *optional*):
            States after the pieces that the pieces of the batch start from; none for the start of a sample.
    """

    def __init__(self, sources: Sequence[ForkStates] = ()) -> None:
        self.initial = _stacked(sources)
        self.final: dict[tuple[str, int], torch.Tensor] = {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Inputs of the convolution just before the batch, shape `(batch, channels, kernel_size)`."""
        return self.initial.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Recurrent state just before the batch, shape `(batch, ...)`."""
        return self.initial.get(("recurrent", state_idx))

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> torch.Tensor:
        """Note inputs of the convolution, shape `(batch, channels, length)`; return them with those before them."""
        kernel_size = conv_kernel_size or conv_states.shape[-1]
        before = self.get_conv_state(layer_idx, state_idx)
        if before is not None:
            conv_states = torch.cat([before, conv_states], dim=-1)
        elif conv_states.shape[-1] < kernel_size:
            conv_states = F.pad(conv_states, (kernel_size - conv_states.shape[-1], 0))
        self.final["conv", state_idx] = conv_states[..., -kernel_size:]
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Note the recurrent state after the batch, shape `(batch, ...)`."""
        self.final["recurrent", state_idx] = recurrent_states
        return recurrent_states

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether the cache could be rolled back: no."""
        return False


def _stacked(sources: Sequence[ForkStates]) -> dict[tuple[str, int], torch.Tensor]:
    if not sources:
        return {}
    if len(sources) == 1:
        return sources[0].final
    return {name: torch.cat([source.final[name] for source in sources]) for name in sources[0].final}
