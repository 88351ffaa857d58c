"""
The load-balancing loss of a mixture of experts, exact although no wave sees the whole row.

With `C_e` the routed tokens of expert `e` and `P_e` the sum of its router probabilities, over all `R` tokens and
layers, the loss is `E · Σ_e C_e/R · P_e/R`. `C_e` has no gradient. So once all `C_e` are known, the loss is linear in
what each wave contributes to `P_e`: its share is `E · Σ_e C_e · P_e(wave) / R²`, and the shares add up to the loss.

Source: `load_balancing_loss_func` of transformers; Switch Transformer, arXiv 2101.03961, equations 4 to 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class LoadBalance:
    """
    Router statistics of a row.

    Args:
        num_experts (`int`):
            Number of experts of a layer.
        experts_per_token (`int`):
            Number of experts that a token visits.
    """

    def __init__(self, num_experts: int, experts_per_token: int) -> None:
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self._routed: torch.Tensor | float = 0.0
        self._total: torch.Tensor | float = 0.0

    def count(self, router_logits: Sequence[torch.Tensor], multiplicity: torch.Tensor) -> None:
        """
        Add the tokens of a wave to the counts of the row.

        Args:
            router_logits (`Sequence[torch.Tensor]`):
                For each layer, logits of shape `(num_tokens, num_experts)`.
            multiplicity (`torch.Tensor` of shape `(1, num_tokens)`):
                How often N-pass runs each token.
        """
        weight = multiplicity.reshape(-1).float()
        for logits in router_logits:
            chosen = logits.softmax(-1).topk(self.experts_per_token, dim=-1).indices
            routed = weight.new_zeros(self.num_experts)
            routed.scatter_add_(0, chosen.reshape(-1), weight.repeat_interleave(self.experts_per_token))
            self._routed = self._routed + routed
            self._total = self._total + weight.sum()

    def share(self, router_logits: Sequence[torch.Tensor], multiplicity: torch.Tensor) -> torch.Tensor:
        """
        Return the share of a wave in the loss of the row, once all waves are counted.

        Args:
            router_logits (`Sequence[torch.Tensor]`):
                For each layer, logits of shape `(num_tokens, num_experts)`.
            multiplicity (`torch.Tensor` of shape `(1, num_tokens)`):
                How often N-pass runs each token.
        """
        weight = multiplicity.reshape(-1).float()
        probability = torch.stack([(logits.softmax(-1).float() * weight[:, None]).sum(0) for logits in router_logits])
        shares: torch.Tensor = self.num_experts * self._routed * probability.sum(0) / self._total**2
        return shares.sum()


class RouterRecorder:
    """
    Notes the router logits that a model's decoder returns, which TRL's fused head does not hand out.

    Args:
        model (`transformers.PreTrainedModel`):
            Mixture-of-experts model, without adapters or wrappers.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.num_experts, self.experts_per_token = int(config.num_experts), int(config.num_experts_per_tok)
        self._logits: Sequence[torch.Tensor] | None = None
        model.base_model.register_forward_hook(self._note)

    def _note(self, module: torch.nn.Module, args: Any, outputs: Any) -> None:
        self._logits = getattr(outputs, "router_logits", None)

    def pop(self) -> Sequence[torch.Tensor]:
        """Return the router logits of the last forward."""
        logits, self._logits = self._logits, None
        assert logits is not None, "the model was asked for router logits"
        return logits

    def start(self) -> LoadBalance:
        """Return the statistics of a new row."""
        return LoadBalance(self.num_experts, self.experts_per_token)
