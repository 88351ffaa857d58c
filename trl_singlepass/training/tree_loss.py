"""TRL's loss on the tree of a row: what is put around the model while TRL computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, logging
from transformers.utils import ModelOutput
from trl import SFTConfig

from ..attention.row_group import RowGroup
from ..data.collator import Batch
from ..data.row_tree import RowTree
from ..engine.enable import Forward, enable_tree, without_adapters
from ..engine.model_call import refuse_own_calls
from ..engine.pieces import Pieces
from ..engine.row_runner import Factors, PieceLoss, RowRunner
from ..engine.ulysses import SequenceParallel, allowing_global_sizes, get_gradient_scale
from ..trees.prefix_tree import IGNORE_INDEX
from .loss import (
    LossContext,
    NumItems,
    PiecewiseSmoother,
    RouterLossScale,
    normalized,
    shared_row_loss,
    total_weight,
    weighted_model,
)
from .refusals import ULYSSES, WEIGHTS, check, check_parts
from .sharding import stop_prefetching
from .situation import Situation


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)

Loss: TypeAlias = torch.Tensor | tuple[torch.Tensor, ModelOutput]
"""What `compute_loss` returns: a scalar, with the model's outputs if they are asked for."""


class TreeLoss:
    """
    Enables trees in a model, and computes TRL's loss on them: at once, in waves, or shared among ranks.

    `compute_loss_func` is the user's own; `smoother` is given if labels are smoothed, and `router_loss_coef` if a
    load-balancing loss is trained. A model that a single pass would train incorrectly raises `UnsupportedModelError`,
    a setting that does not work with waves or with shared rows `ValueError`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: SFTConfig,
        accelerator: Accelerator,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        smoother: PiecewiseSmoother | None = None,
        router_loss_coef: float | None = None,
    ) -> None:
        enable_tree(model)
        self._model, self._args = model, args
        self._compute_loss_func, self._smoother = compute_loss_func, smoother
        self._accelerator, self._router_loss_coef = accelerator, router_loss_coef or 0.0
        if args.wave_tokens is not None:
            stop_prefetching(accelerator)
            check_parts(Situation(args, model, accelerator, compute_loss_func=compute_loss_func))
        if args.log_turn_metrics:
            refuse_own_calls(without_adapters(model), "log_turn_metrics")
        self.pieces = Pieces(
            model,
            args,
            accelerator,
            setting=None if args.wave_tokens is None else "wave_tokens",
            knows_loss=compute_loss_func is None,
            has_router_loss=router_loss_coef is not None,
        )
        self.sequence_parallel: SequenceParallel | None = None
        if getattr(accelerator.parallelism_config, "sp_size", 1) > 1:
            with allowing_global_sizes(without_adapters(model).config.get_text_config()):
                check(Situation(args, model, accelerator), ULYSSES)
            self.sequence_parallel = SequenceParallel(without_adapters(model), accelerator)

    def compute(
        self,
        compute_loss: Callable[..., Loss],
        model: nn.Module,
        batch: Batch,
        return_outputs: bool,
        context: LossContext,
    ) -> Loss:
        """
        Return the loss of a batch with a `tree`, along with the model's outputs if asked for. `compute_loss` is TRL's.
        """
        row: RowTree = batch["tree"]
        group = None if self.sequence_parallel is None or not row.is_shared else self.sequence_parallel.group
        runner = self._runner(model, batch, context, group)
        router_loss, num_items = RouterLossScale(row), context.num_items
        forward: Forward = router_loss.wrap(model if runner is None else runner)
        if context.turn_metrics is not None:
            forward = context.turn_metrics.wrap(forward, row.label_parts, row.loss_weights)
        if row.loss_weights is not None:
            check(Situation(self._args, compute_loss_func=self._compute_loss_func), WEIGHTS)
            # Normalised here, so that TRL's guard against division by a sum below 1 changes nothing.
            weights = row.loss_weights if group is not None else normalized(row.loss_weights, num_items)
            forward = weighted_model(forward, weights)
            num_items = None if num_items is None else 1
        batch = {**batch, "tree": row.handled()}
        if group is not None:
            assert self.sequence_parallel is not None
            self.sequence_parallel.watch_gradients(model)
            ranks, coef = self._accelerator.num_processes // group.size, self._router_loss_coef
            loss: Loss = shared_row_loss(compute_loss, forward, batch, context, group, ranks=ranks, router_coef=coef)
        else:
            loss = compute_loss(forward, batch, return_outputs, num_items)
        router_loss.log_mean(context.metrics, self._accelerator)
        if runner is not None and torch.is_grad_enabled():
            value, *outputs = loss if isinstance(loss, tuple) else (loss,)
            loss = (runner.backward(value), *outputs) if outputs else runner.backward(value)
        if group is None:
            return loss
        # The mean over ranks is their part of the loss of the step; only gradients are scaled.
        assert isinstance(loss, torch.Tensor)
        return loss + (1 / get_gradient_scale(model, group.size) - 1) * (loss - loss.detach())

    def _runner(
        self, model: nn.Module, batch: Batch, context: LossContext, group: RowGroup | None
    ) -> RowRunner | None:
        """Return what runs the row in place of the model, `None` if it runs at once; say how it runs."""
        if self.pieces.setting is None and group is None:
            return None
        plan = self.pieces.plan(batch["tree"].plan)
        if self.pieces.setting is not None:
            if self._model.training:
                logger.info(f"Step {context.step}: {plan}.")
            context.metrics["num_waves"].append(float(len(plan.waves)))
        return self.pieces.runner(
            model,
            [batch],
            [plan],
            divisor=context.divisor,
            loss=None if self._compute_loss_func is not None else self._piece_loss(batch, context, group),
            is_own_loss=self._compute_loss_func is not None,
            trains=self._model.training,
            group=group,
        )

    def _piece_loss(self, batch: Batch, context: LossContext, group: RowGroup | None) -> PieceLoss:
        """Return what a piece contributes to the loss that TRL computes."""
        labels, given = batch["labels"], batch["tree"].loss_weights
        total, ranks = self._divisor(batch, context.num_items, group)
        if self._smoother is not None and torch.is_grad_enabled():
            return self._smoother.of_pieces(labels, total, ranks)
        weights = (labels != IGNORE_INDEX).float() if given is None else given
        factors = F.pad(weights[:, 1:], (0, 1)) * ranks / total
        router_loss = batch["tree"].router_loss_scale * self._router_loss_coef / context.num_batches
        return Factors(-factors, router_loss, is_dft=self._args.loss_type == "dft")

    def _divisor(self, batch: Batch, num_items: NumItems, group: RowGroup | None) -> tuple[torch.Tensor, int]:
        """Return what the sum over a batch is divided by, a scalar, and what TRL multiplies the loss by."""
        total = total_weight(batch) if num_items is None else num_items
        total = torch.as_tensor(total, device=batch["labels"].device)
        ranks = 1
        if group is not None:  # their loss is divided by the weights of all ranks in any case
            ranks = self._accelerator.num_processes // group.size
        elif self._args.average_tokens_across_devices and num_items is not None:
            ranks = self._accelerator.num_processes
        # TRL's guard against division by zero; weighted losses are normalised before it.
        return (total.clamp(min=1) if batch["tree"].loss_weights is None else total), ranks
