"""TRL's loss on the tree of a row: a mean over the tokens of a step, each counted as often as N-pass trains it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from transformers import logging
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import ModelOutput
from trl import SFTTrainer

from ..attention.rope import switching_lengths
from ..attention.row_group import RowGroup
from ..data.collator import Batch
from ..data.row_tree import RowTree
from ..engine.enable import Forward, enable_tree, without_adapters
from ..engine.model_call import refuse_own_calls
from ..engine.pieces import Pieces
from ..engine.row_runner import Factors, PieceLoss, RowRunner
from ..engine.ulysses import SequenceParallel, allowing_global_sizes, get_gradient_scale
from ..trees.prefix_tree import IGNORE_INDEX
from .metrics import TurnMetrics
from .refusals import ULYSSES, WEIGHTS, check


logger = logging.get_logger(__name__)

NumItems: TypeAlias = torch.Tensor | int | None
"""The Trainer's `num_items_in_batch`: what the summed loss of a step is divided by, `None` in evaluation."""
Loss: TypeAlias = torch.Tensor | tuple[torch.Tensor, ModelOutput]
"""What `compute_loss` returns: a scalar, with the model's outputs if they are asked for."""


class TreeLoss:
    """
    Enables trees in the model of a trainer, and computes TRL's loss on them: at once, in waves, or shared among ranks.

    A model that a single pass would train incorrectly raises `UnsupportedModelError`, a setting that does not work
    with waves or with shared rows `ValueError`.
    """

    def __init__(self, trainer: SFTTrainer) -> None:
        args, base = trainer.args, without_adapters(trainer.model)
        enable_tree(trainer.model)
        trainer._collator.rope_lengths = tuple(sorted(switching_lengths(base)))
        self._trainer = trainer
        # Since TRL 1.16.
        self._router_loss_coef = getattr(trainer, "router_aux_loss_coef", 0.0) if trainer.aux_loss_enabled else 0.0
        self.smoother: PiecewiseSmoother | None = None
        self.pieces: Pieces = trainer._make_pieces("wave_tokens", knows_loss=trainer.compute_loss_func is None)
        if args.wave_tokens is not None and args.label_smoothing_factor and args.loss_type == "nll":
            self.smoother = PiecewiseSmoother(LabelSmoother(args.label_smoothing_factor))
        if args.log_turn_metrics:
            refuse_own_calls(base, "log_turn_metrics")
        self.sequence_parallel: SequenceParallel | None = None
        if getattr(trainer.accelerator.parallelism_config, "sp_size", 1) > 1:
            with allowing_global_sizes(base.config.get_text_config()):
                check(trainer._situation, ULYSSES)
            self.sequence_parallel = SequenceParallel(base, trainer.accelerator)

    def compute(
        self,
        compute_loss: Callable[..., Loss],
        model: nn.Module,
        batch: Batch,
        return_outputs: bool,
        num_items: NumItems,
    ) -> Loss:
        """Return TRL's loss of a batch with a `tree`, along with the model's outputs if asked for."""
        row: RowTree = batch["tree"]
        group = None if self.sequence_parallel is None or not row.is_shared else self.sequence_parallel.group
        metrics = self._trainer._metrics["train" if self._trainer.model.training else "eval"]
        runner = self._runner(model, batch, num_items, group, metrics)
        weights, divisor = row.loss_weights, num_items
        if weights is not None:
            check(self._trainer._situation, WEIGHTS)
            if group is None:  # normalised here, so that TRL's guard against division by a sum below 1 changes nothing
                total = weights.sum() if num_items is None else torch.as_tensor(num_items)
                weights = weights / total.clamp(min=torch.finfo(weights.dtype).tiny)
            divisor = None if num_items is None else 1
        router_losses: list[torch.Tensor] = []
        by_turn = self._trainer._turn_metrics
        forward = _on_outputs(model if runner is None else runner, row, weights, by_turn, router_losses)
        batch = {**batch, "tree": row.handled()}
        if group is not None:
            loss: Loss = self._shared_row_loss(compute_loss, model, forward, batch, num_items, group)
        else:
            loss = compute_loss(forward, batch, return_outputs, divisor)
        if router_losses:  # TRL's log leaves out ranks at the end of an epoch, as if each had one example
            metrics["aux_loss"][-1] = float(self._trainer.accelerator.gather(router_losses[-1][None]).mean())
        if runner is not None and torch.is_grad_enabled():
            value, *outputs = loss if isinstance(loss, tuple) else (loss,)
            loss = (runner.backward(value), *outputs) if outputs else runner.backward(value)
        if group is None:
            return loss
        # The mean over ranks is their part of the loss of the step; only gradients are scaled.
        assert isinstance(loss, torch.Tensor)
        return loss + (1 / get_gradient_scale(model, group.size) - 1) * (loss - loss.detach())

    def _num_batches(self, num_items: NumItems) -> int:
        """Return how many batches of this rank a step has, 1 in evaluation."""
        trains = self._trainer.model.training and num_items is not None
        return self._trainer.current_gradient_accumulation_steps if trains else 1

    def _runner(
        self,
        model: nn.Module,
        batch: Batch,
        num_items: NumItems,
        group: RowGroup | None,
        metrics: dict[str, list[float]],
    ) -> RowRunner | None:
        """Return what runs the row in place of the model, `None` if it runs at once; say how it runs."""
        if self.pieces.setting is None and group is None:
            return None
        trainer, plan = self._trainer, self.pieces.plan(batch["tree"].plan)
        if self.pieces.setting is not None:
            if trainer.model.training:
                logger.info(f"Step {trainer.state.global_step + 1}: {plan}.")
            metrics["num_waves"].append(float(len(plan.waves)))
        is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # since transformers 5.19, `None` unless it is set
        is_scaled = trainer.model_accepts_loss_kwargs if is_scaled is None else is_scaled
        is_own_loss = trainer.compute_loss_func is not None
        return self.pieces.runner(
            model,
            [batch],
            [plan],
            divisor=1 if is_scaled else self._num_batches(num_items),
            loss=None if is_own_loss else self._piece_loss(batch, num_items, group),
            is_own_loss=is_own_loss,
            trains=trainer.model.training,
            group=group,
        )

    def _piece_loss(self, batch: Batch, num_items: NumItems, group: RowGroup | None) -> PieceLoss:
        """Return what a piece contributes to the loss that TRL computes."""
        labels, given = batch["labels"], batch["tree"].loss_weights
        total, ranks = self._divisor(batch, num_items, group)
        if self.smoother is not None and torch.is_grad_enabled():
            return self.smoother.of_pieces(labels, total, ranks)
        weights = (labels != IGNORE_INDEX).float() if given is None else given
        factors = F.pad(weights[:, 1:], (0, 1)) * ranks / total
        router_loss = batch["tree"].router_loss_scale * self._router_loss_coef / self._num_batches(num_items)
        return Factors(-factors, router_loss, is_dft=self._trainer.args.loss_type == "dft")

    def _divisor(self, batch: Batch, num_items: NumItems, group: RowGroup | None) -> tuple[torch.Tensor, int]:
        """Return what the sum over a batch is divided by, a scalar, and what TRL multiplies the loss by."""
        total = total_weight(batch) if num_items is None else num_items
        total = torch.as_tensor(total, device=batch["labels"].device)
        ranks = 1
        if group is not None:  # their loss is divided by the weights of all ranks in any case
            ranks = self._trainer.accelerator.num_processes // group.size
        elif self._trainer.args.average_tokens_across_devices and num_items is not None:
            ranks = self._trainer.accelerator.num_processes
        # TRL's guard against division by zero; weighted losses are normalised before it.
        return (total.clamp(min=1) if batch["tree"].loss_weights is None else total), ranks

    def _shared_row_loss(
        self,
        compute_loss: Callable[..., object],
        model: nn.Module,
        forward: Forward,
        inputs: Batch,
        num_items: NumItems,
        group: RowGroup,
    ) -> torch.Tensor:
        """
        Return the loss of a row that ranks share, such that the mean over ranks is its part of the loss of the step.

        TRL only computes the metrics: its loss would be the mean over batches of each batch's mean, not over tokens.
        """
        assert self.sequence_parallel is not None
        self.sequence_parallel.watch_gradients(model)
        losses: list[torch.Tensor] = []

        def shared(*, shift_labels: torch.Tensor, **options: object) -> ModelOutput:
            outputs = forward(**options | inputs)
            total = torch.as_tensor(num_items).clamp(min=torch.finfo(torch.float32).tiny)
            loss = -outputs.log_probs.sum() / total * (self._trainer.accelerator.num_processes // group.size)
            if outputs.aux_loss is not None:
                loss = loss + self._router_loss_coef * outputs.aux_loss / self._num_batches(num_items)
            losses.append(loss)
            outputs.loss = loss.detach()
            return outputs

        own = group.part(inputs["attention_mask"])  # TRL counts tokens on all ranks
        compute_loss(shared, {**inputs, "attention_mask": own, "shift_labels": inputs["labels"]})
        return losses[0]


def _on_outputs(
    model: Forward,
    row: RowTree,
    loss_weights: torch.Tensor | None,
    turn_metrics: TurnMetrics | None,
    router_losses: list[torch.Tensor],
) -> Forward:
    """
    Return the model with what a row asks for done to its outputs, before TRL reads them.

    TRL's loss is `-Σ log_probs / num_items`, its metrics `Σ entropy / Σ label_mask` and `Σ is_top1 / Σ label_mask`.
    With each term multiplied by the weight `w` of its target, `(1, row_length)`, the loss becomes
    `-Σ w · log p / num_items` and the metrics weighted means: what N-pass computes when `w` samples train a target.

    A load-balancing loss is multiplied by `router_loss_scale`, and kept in `router_losses`, where it is not 1 (which
    all ranks have in common, see [`scale_router_loss`]).
    """
    if row.router_loss_scale == 1 and loss_weights is None and turn_metrics is None:
        return model

    def forward(**inputs: object) -> ModelOutput:
        outputs = model(**inputs)
        if row.router_loss_scale != 1 and outputs.get("aux_loss") is not None:
            outputs.aux_loss = row.router_loss_scale * outputs.aux_loss
            router_losses.append(outputs.aux_loss.detach())
        if turn_metrics is not None and inputs.get("fused_lm_head"):  # some losses ask for logits first
            turn_metrics.add(outputs, row.label_parts, row.loss_weights)
        if loss_weights is not None:
            weights = loss_weights[:, 1:]  # aligned with the labels, which the fused head shifts by one
            for name in ("log_probs", "entropy", "is_top1", "label_mask"):
                outputs[name] = outputs[name] * weights
        return outputs

    return forward


def total_weight(batch: Batch) -> torch.Tensor:
    """Return the sum of the loss weights of a batch, a scalar: what its loss is divided by."""
    weights: torch.Tensor | None = batch["tree"].loss_weights if "tree" in batch else None
    return (batch["labels"][..., 1:] != IGNORE_INDEX if weights is None else weights).sum()


def step_weights(batches: Sequence[Batch], accelerator: Accelerator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the loss weights of this rank's batches of a step, a scalar, and of all, `(num_ranks,)`."""
    own = torch.stack([total_weight(batch) for batch in batches]).sum().float().to(accelerator.device)
    return own, accelerator.gather(own[None])


def mean_of_means_divisor(own: torch.Tensor, everyone: torch.Tensor) -> torch.Tensor:
    """
    Return the divisor of a rank's loss for which the mean over ranks is the mean of the ranks' own means.

    A rank that only has repeated rows has no mean, and does not count: with weights of 10, 30 and 0, the first two
    ranks divide by 10 · 2/3 and 30 · 2/3, so that a third of the sum is half the sum of their means. Takes what
    [`step_weights`] returns.
    """
    return own * ((everyone > 0).sum() / len(everyone))


class PiecewiseSmoother:
    """
    A label smoother that takes a row piece by piece, since logits of a whole row are what pieces avoid.

    Its loss is a sum over targets, divided by their number in the whole step, so pieces add up to the loss of the row.
    It stands in the place of the Trainer's.
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
        """Return what a piece contributes to a sum divided by `total`, of a loss that TRL multiplies by `ranks`."""
        self._ranks = ranks
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)

        def loss(outputs: ModelOutput, start: int) -> torch.Tensor:
            own = targets[:, start : start + outputs.logits.shape[1]]
            of_piece: torch.Tensor = self._smoother({"logits": outputs.logits}, own, num_items_in_batch=total)
            return ranks * of_piece

        return loss
