"""How the loss of a batch becomes a mean over the tokens of a step, each counted as often as N-pass trains it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import ModelOutput
from trl import SFTTrainer

from ..attention.row_group import RowGroup
from ..data.collator import Batch
from ..data.row_tree import RowTree
from ..engine.enable import Forward
from ..engine.row_runner import PieceLoss
from ..trees.prefix_tree import IGNORE_INDEX
from .metrics import TurnMetrics


NumItems: TypeAlias = torch.Tensor | int | None
"""The Trainer's `num_items_in_batch`: what the summed loss of a step is divided by, `None` in evaluation."""


@dataclass(frozen=True, slots=True)
class LossContext:
    """What the trainer knows of the batch whose loss is computed."""

    # divisor of the summed loss: the sum of the loss weights of the step over all ranks; `None` in evaluation, where
    # each batch is divided by its own
    num_items: NumItems
    num_batches: int  # of this rank in the step
    divisor: int  # what `Trainer.training_step` divides the loss by before the backward pass: `num_batches`, or 1
    step: int
    metrics: dict[str, list[float]]  # TRL's, of training or of evaluation; the log averages each list
    turn_metrics: TurnMetrics | None


def get_loss_context(trainer: SFTTrainer, num_items: NumItems, turn_metrics: TurnMetrics | None) -> LossContext:
    """Return what a trainer knows of the batch that it is about to compute the loss of."""
    is_training = trainer.model.training
    num_batches = trainer.current_gradient_accumulation_steps if is_training and num_items is not None else 1
    is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # since transformers 5.19, `None` unless it is set
    is_scaled = trainer.model_accepts_loss_kwargs if is_scaled is None else is_scaled
    metrics = trainer._metrics["train" if is_training else "eval"]
    step = trainer.state.global_step + 1
    return LossContext(num_items, num_batches, 1 if is_scaled else num_batches, step, metrics, turn_metrics)


def weighted_model(model: Forward, loss_weights: torch.Tensor) -> Forward:
    """
    Return the model with every per-token output of its fused head multiplied by the loss weights.

    TRL's loss is `-Σ log_probs / num_items`, its metrics `Σ entropy / Σ label_mask` and `Σ is_top1 / Σ label_mask`.
    With each term multiplied by the weight `w` of its target, the loss becomes `-Σ w · log p / num_items` and the
    metrics become weighted means: what N-pass computes when `w` samples train the same target.

    Takes a model whose fused head returns per-token outputs (TRL 1.15 and later), and the weight of each rolled label,
    float32 of shape `(1, row_length)`.
    """

    def forward(**inputs: object) -> ModelOutput:
        outputs = model(**inputs)
        weights = loss_weights[:, 1:]  # aligned with the labels, which the fused head shifts by one
        for name in ("log_probs", "entropy", "is_top1", "label_mask"):
            outputs[name] = outputs[name] * weights
        return outputs

    return forward


class RouterLossScale:
    """
    Multiplies the load-balancing loss of a batch by its `router_loss_scale`, if that is not 1.

    In such a step, all ranks have a factor other than 1 (see [`scale_router_loss`]).
    """

    def __init__(self, row: RowTree) -> None:
        self._scale = row.router_loss_scale
        self._loss: torch.Tensor | None = None

    def wrap(self, model: Forward) -> Forward:
        """Return the model with its load-balancing loss multiplied by the factor."""
        if self._scale == 1:
            return model

        def forward(**inputs: object) -> ModelOutput:
            outputs = model(**inputs)
            if outputs.get("aux_loss") is not None:
                outputs.aux_loss = self._scale * outputs.aux_loss
                self._loss = outputs.aux_loss.detach()
            return outputs

        return forward

    def log_mean(self, metrics: dict[str, list[float]], accelerator: Accelerator) -> None:
        """Log the mean over all ranks; TRL leaves out some at the end of an epoch, as if each had one example."""
        if self._loss is not None:
            metrics["aux_loss"][-1] = float(accelerator.gather(self._loss[None]).mean())


def normalized(loss_weights: torch.Tensor, total: torch.Tensor | int | None = None) -> torch.Tensor:
    """
    Return loss weights divided by their sum; if all are 0, they stay 0.

    Takes the weight of each rolled label, float32 of shape `(1, row_length)`, and returns the same shape. `total` is
    the sum of the weights of a whole step; that of these weights by default.
    """
    total = loss_weights.sum() if total is None else torch.as_tensor(total)
    return loss_weights / total.clamp(min=torch.finfo(loss_weights.dtype).tiny)


def total_weight(batch: Batch) -> torch.Tensor:
    """Return the sum of the loss weights of a batch, a scalar: what its loss is divided by."""
    weights: torch.Tensor | None = batch["tree"].loss_weights if "tree" in batch else None
    return (batch["labels"][..., 1:] != IGNORE_INDEX if weights is None else weights).sum()


def step_weights(batches: Sequence[Batch], accelerator: Accelerator) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the sum of the loss weights of this rank's batches of a step, and those of all ranks, in `torch.float32`.

    Returns a scalar, and a tensor of shape `(num_ranks,)`. Every rank must call.
    """
    own = torch.stack([total_weight(batch) for batch in batches]).sum().float().to(accelerator.device)
    return own, accelerator.gather(own[None])


def mean_of_means_divisor(own: torch.Tensor, everyone: torch.Tensor) -> torch.Tensor:
    """
    Return the divisor of a rank's loss for which the mean over ranks is the mean of the ranks' own means.

    A rank that only has repeated rows has no mean, and does not count: with weights of 10, 30 and 0, the first two
    ranks divide by 10 · 2/3 and 30 · 2/3, so that a third of the sum is half the sum of their means.

    Takes what [`step_weights`] returns: the sum of this rank's weights, a scalar, and those of all ranks,
    `(num_ranks,)`.
    """
    return own * ((everyone > 0).sum() / len(everyone))


class PiecewiseSmoother:
    """
    A label smoother that takes a row piece by piece, since logits of a whole row are what pieces avoid.

    Its loss is a sum over targets, divided by their number in the whole step, so pieces add up to the loss of the row.
    Takes the smoother of the Trainer, and stands in its place.
    """

    def __init__(self, smoother: LabelSmoother) -> None:
        self._smoother, self._ranks = smoother, 1

    def __call__(self, outputs: ModelOutput, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        """Return the loss of a row: of its logits, or of its pieces, which have computed it."""
        if outputs.get("loss") is None:
            loss: torch.Tensor = self._smoother(outputs, labels, **options)
            return loss
        of_pieces: torch.Tensor = outputs.loss
        return of_pieces / self._ranks

    def of_pieces(self, labels: torch.Tensor, total: torch.Tensor, ranks: int) -> PieceLoss:
        """
        Return what a piece contributes to the loss of a row with these rolled labels, of shape `(1, row_length)`.

        The sum is divided by `total`; TRL multiplies the loss by `ranks`.
        """
        self._ranks = ranks
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)

        def loss(outputs: ModelOutput, start: int) -> torch.Tensor:
            own = targets[:, start : start + outputs.logits.shape[1]]
            of_piece: torch.Tensor = self._smoother({"logits": outputs.logits}, own, num_items_in_batch=total)
            return ranks * of_piece

        return loss


def shared_row_loss(
    compute_loss: Callable[..., object],
    model: Forward,
    inputs: Batch,
    context: LossContext,
    group: RowGroup,
    *,
    ranks: int,
    router_coef: float,
) -> torch.Tensor:
    """
    Return the loss of a row that ranks share, such that the mean over ranks is its part of the loss of the step.

    TRL only computes the metrics: its loss would be the mean over batches of each batch's mean, not over tokens.

    `compute_loss` is TRL's; `model` runs a row, with the weight of each target; `inputs` are those of the whole row.
    `ranks` counts the groups of ranks, and `router_coef` is the factor of the load-balancing loss.
    """
    losses: list[torch.Tensor] = []

    def forward(*, shift_labels: torch.Tensor, **options: object) -> ModelOutput:
        outputs = model(**options | inputs)
        num_items = torch.as_tensor(context.num_items).clamp(min=torch.finfo(torch.float32).tiny)
        loss = -outputs.log_probs.sum() / num_items * ranks
        if outputs.aux_loss is not None:
            loss = loss + router_coef * outputs.aux_loss / context.num_batches
        losses.append(loss)
        outputs.loss = loss.detach()
        return outputs

    own = group.part(inputs["attention_mask"])  # TRL counts tokens on all ranks
    compute_loss(forward, {**inputs, "attention_mask": own, "shift_labels": inputs["labels"]})
    return losses[0]
