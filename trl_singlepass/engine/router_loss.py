"""
The load-balancing loss of a mixture of experts, piece by piece: exact, although no piece sees the whole batch.

With `C_e` the tokens routed to expert `e` and `P_e` the sum of its router probabilities, over all `R` tokens and
layers, it is `E · Σ_e C_e/R · P_e/R`. `C_e` has no gradient, so once all `C_e` are known the loss is linear in each
piece's part of `P_e`: the share of a piece is `E · Σ_e C_e · P_e(piece) / R²`, and the shares add up to the loss.

Source: `load_balancing_loss_func` of transformers; Switch Transformer, arXiv 2101.03961, equations 4 to 6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..attention.row_group import RowGroup


class LoadBalancingLoss:
    """
    Load-balancing loss of one batch: [`count`] every piece first, then ask for the [`share`] of each.

    Both take router logits of a piece, `(num_tokens, num_experts)` per layer, and the multiplicity of its tokens,
    `(1, num_tokens)`. Where ranks share rows, logits are of this rank's part, and results add up over the ranks.
    """

    def __init__(self, num_experts: int, experts_per_token: int, group: RowGroup | None = None) -> None:
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.group = group
        self._routed: torch.Tensor | float = 0.0
        self._probability: torch.Tensor | float = 0.0
        self._total: torch.Tensor | float = 0.0
        self._has_all = False

    def count(self, router_logits: Sequence[torch.Tensor], multiplicity: torch.Tensor) -> None:
        """Add the tokens of a piece to the counts of the batch."""
        weight = self._weight(multiplicity)
        for logits in router_logits:
            probability = logits.softmax(-1)
            chosen = probability.topk(self.experts_per_token, dim=-1).indices
            routed = weight.new_zeros(self.num_experts)
            routed.scatter_add_(0, chosen.reshape(-1), weight.repeat_interleave(self.experts_per_token))
            self._routed = self._routed + routed
            self._probability = self._probability + (probability.float() * weight[:, None]).sum(0)
            self._total = self._total + weight.sum()

    def value(self) -> torch.Tensor:
        """Return the loss of all pieces that were counted, without a gradient."""
        self._add_up_over_ranks()
        probability = torch.as_tensor(self._probability)
        probability = probability if self.group is None else self.group.sum(probability)
        loss: torch.Tensor = (self.num_experts * self._routed * probability / self._total**2).sum()
        return loss.detach()

    def share(self, router_logits: Sequence[torch.Tensor], multiplicity: torch.Tensor) -> torch.Tensor:
        """Return what a piece contributes to the loss of the batch."""
        weight = self._weight(multiplicity)
        probability = torch.stack([(logits.softmax(-1).float() * weight[:, None]).sum(0) for logits in router_logits])
        self._add_up_over_ranks()
        share: torch.Tensor = (self.num_experts * self._routed * probability.sum(0) / self._total**2).sum()
        return share if self.group is None else self.group.sum(share)

    def _weight(self, multiplicity: torch.Tensor) -> torch.Tensor:
        own = multiplicity if self.group is None else self.group.pad_and_part(multiplicity)
        return own.reshape(-1).float()

    def _add_up_over_ranks(self) -> None:
        """Count the tokens of all ranks; every rank has counted its own by now."""
        if self.group is not None and not self._has_all:
            self._routed = self.group.sum(torch.as_tensor(self._routed))
            self._total = self.group.sum(torch.as_tensor(self._total))
        self._has_all = True


class RouterRecorder:
    """Records the router logits that a model's decoder returns: TRL's fused head does not pass them on."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.num_experts, self.experts_per_token = int(config.num_experts), int(config.num_experts_per_tok)
        self._logits: Sequence[torch.Tensor] | None = None
        model.base_model.register_forward_hook(self._record)

    def _record(self, module: torch.nn.Module, args: tuple[object, ...], outputs: ModelOutput) -> None:
        self._logits = getattr(outputs, "router_logits", None)

    def pop(self) -> Sequence[torch.Tensor]:
        """Return the router logits of the last forward."""
        logits, self._logits = self._logits, None
        assert logits is not None, "the model was asked for router logits"
        return logits
