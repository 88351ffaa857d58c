"""The loss of one wave: its share of TRL's loss of the whole row, and of the load-balancing loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .balance import LoadBalance
from .plan import Wave
from .state import select


@dataclass(eq=False)
class WaveLoss:
    """
    TRL's loss, wave by wave: `-Σ c · log p` (nll) or `-Σ c · sg(p) · log p` (dft, arXiv 2508.05629).

    Args:
        coefficients (`torch.Tensor` of shape `(1, row_length)`, `torch.float32`):
            Factor `c` of the loss of the target of each position.
        is_dft (`bool`):
            Whether each token's loss is multiplied by its probability.
        balance (`LoadBalance`, *optional*):
            Load-balancing loss of a mixture of experts.
        balance_coefficient (`float`, *optional*, defaults to 0):
            Its factor.
    """

    coefficients: torch.Tensor
    is_dft: bool
    balance: LoadBalance | None = None
    balance_coefficient: float = 0.0
    total: float | torch.Tensor = field(default=0.0, init=False)

    def __call__(self, wave: Wave, outputs: Any) -> torch.Tensor:
        """
        Return the loss of a wave.

        Args:
            wave (`Wave`):
                The wave.
            outputs (`Any`):
                Outputs of TRL's fused head, with `log_probs` of shape `(1, num_tokens)`.
        """
        log_probs = outputs.log_probs
        loss: torch.Tensor = -log_probs * select(self.coefficients, ((wave.start, wave.end),))
        if self.is_dft:
            loss = loss * log_probs.exp().detach()
        loss = loss.sum()
        if outputs.aux_loss is not None:
            loss = loss + self.balance_coefficient * outputs.aux_loss
        self.total = self.total + loss.detach()
        return loss
