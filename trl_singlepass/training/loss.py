"""Loss weights on top of TRL's own loss: each target counts as often as N-pass trains it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..trees.prefix_tree import IGNORE_INDEX


def weighted_model(model: Callable[..., Any], loss_weights: torch.Tensor) -> Callable[..., Any]:
    """
    Return the model with every per-token output of its fused head multiplied by the loss weights.

    TRL's loss is `-Σ log_probs / num_items`, its metrics `Σ entropy / Σ label_mask` and `Σ is_top1 / Σ label_mask`.
    With each term multiplied by the weight `w` of its target, the loss becomes `-Σ w · log p / num_items` and the
    metrics become weighted means: what N-pass computes when `w` samples train the same target.

    Args:
        model (`Callable`):
            Model, or its wrapper, whose fused head returns per-token outputs (TRL 1.15 and later).
        loss_weights (`torch.Tensor` of shape `(1, row_length)`, `torch.float32`):
            Weight of each rolled label.

    Returns:
        `Callable`: The same forward, weighted.
    """

    def forward(**kwargs: Any) -> Any:
        outputs = model(**kwargs)
        weights = loss_weights[:, 1:]  # aligned with the labels, which the fused head shifts by one
        for name in ("log_probs", "entropy", "is_top1", "label_mask"):
            outputs[name] = outputs[name] * weights
        return outputs

    return forward


def normalized(loss_weights: torch.Tensor, total: torch.Tensor | int | None = None) -> torch.Tensor:
    """
    Return loss weights divided by their sum; zeros stay zeros where there are no others.

    Args:
        loss_weights (`torch.Tensor` of shape `(1, row_length)`, `torch.float32`):
            Weight of each rolled label.
        total (`torch.Tensor` or `int`, *optional*):
            Sum of the weights of a whole step; that of these weights by default.

    Returns:
        `torch.Tensor` of shape `(1, row_length)`: The weights.
    """
    total = loss_weights.sum() if total is None else torch.as_tensor(total)
    return loss_weights / total.clamp(min=torch.finfo(loss_weights.dtype).tiny)


def total_weight(batch: dict[str, Any]) -> torch.Tensor:
    """
    Return the sum of the loss weights of a batch: what its loss is divided by.

    Args:
        batch (`dict[str, Any]`):
            Batch of the collator, `labels` of shape `(batch, row_length)`, with `loss_weights` if some differ from 1.

    Returns:
        `torch.Tensor`: Scalar.
    """
    if "loss_weights" in batch:  # parts of rows, under sequence parallelism, always have them
        weights: torch.Tensor = batch["loss_weights"]
    else:
        weights = batch["labels"][..., 1:] != IGNORE_INDEX
    return weights.sum()


def step_weight(batches: Sequence[dict[str, Any]]) -> torch.Tensor:
    """
    Return the sum of the loss weights of the batches of a step, as `torch.float32`.

    Args:
        batches (`Sequence[dict[str, Any]]`):
            Batches of this rank.

    Returns:
        `torch.Tensor`: Scalar.
    """
    return torch.stack([total_weight(batch) for batch in batches]).sum().float()
