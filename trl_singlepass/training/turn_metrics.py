"""Loss and accuracy by turn, for reasoning and for answers: what `log_turn_metrics` logs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from ..trees.sample import PARTS


NUM_TURNS = 16  # later turns are logged together
_GROUPS = {"": (0, 1, 2), "reasoning_": (0,), "answer_": (1, 2), "first_answer_token_": (1,)}


class TurnMetrics:
    """
    Running sums by turn and part of a turn; nothing is read from the device before the log asks.

    Args:
        device (`torch.device`):
            Device of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # Loss weight, loss and correct predictions; what is no target first, all later turns last.
        self._sums = torch.zeros(1 + (NUM_TURNS + 1) * len(PARTS), 3, dtype=dtype, device=device)

    def over(
        self, model: Callable[..., Any], label_parts: torch.Tensor, loss_weights: torch.Tensor | None
    ) -> Callable[..., Any]:
        """
        Return the model, its losses added up by turn whenever it computes them.

        Args:
            model (`Callable`):
                Model, or its wrapper, whose fused head returns per-token outputs (TRL 1.15 and later).
            label_parts (`torch.Tensor` of shape `(1, row_length)`, `torch.int64`):
                For each rolled label, what it is part of ([`Sample.token_parts`]).
            loss_weights (`torch.Tensor` of shape `(1, row_length)`, `torch.float32`, *optional*):
                Weight of each rolled label; 1 if not given.

        Returns:
            `Callable`: The same forward.
        """
        code = label_parts[0, 1:] - 1
        turn = torch.div(code, len(PARTS), rounding_mode="floor").clamp(max=NUM_TURNS)
        parts = 1 + turn * len(PARTS) + code % len(PARTS)

        def forward(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            if getattr(outputs, "log_probs", None) is not None:  # some losses ask for logits first
                values = (outputs.label_mask, -outputs.log_probs, outputs.is_top1)
                columns = torch.stack([value.detach().flatten().to(self._sums) for value in values], dim=-1)
                weights = 1 if loss_weights is None else loss_weights[0, 1:, None].to(self._sums)
                self._sums.index_add_(0, parts, columns * weights)
            return outputs

        return forward

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Return the means since the last call, over all processes.

        Args:
            accelerator (`accelerate.Accelerator`):
                Accelerator of the run; every process has to call this.

        Returns:
            `dict[str, float]`: `turn_1/loss`, `turn_1/accuracy`, the same with `reasoning_`, `answer_` and
            `first_answer_token_` before the last word, for each turn that was trained and for `all_turns`.
        """
        sums = accelerator.reduce(self._sums, reduction="sum")[1:].reshape(NUM_TURNS + 1, len(PARTS), 3).cpu()
        self._sums.zero_()
        names = [*(f"turn_{number}" for number in range(1, NUM_TURNS + 1)), f"turns_after_{NUM_TURNS}", "all_turns"]
        metrics: dict[str, float] = {}
        for name, of_turn in zip(names, [*sums, sums.sum(0)], strict=True):
            for prefix, members in _GROUPS.items():
                weight, loss, correct = of_turn[list(members)].sum(0).tolist()
                if weight > 0:
                    metrics[f"{name}/{prefix}loss"] = loss / weight
                    metrics[f"{name}/{prefix}accuracy"] = correct / weight
        return metrics
