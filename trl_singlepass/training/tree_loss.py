"""TRL's loss on the tree of a row: what is put around the model while TRL computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl import SFTConfig

from ..data.collator import Batch, DataCollatorForSinglePass
from ..data.row_tree import RowTree
from ..engine.enable import Forward, enable_tree, without_adapters
from ..engine.model_call import as_tree, refuse_own_calls
from ..waves.loss import RouterRecorder
from .compatibility import check_weights_reach_the_loss
from .images import Rows, read_images, show_images
from .loss import LossContext, RouterLossScale, normalized, weighted_model
from .sequence_parallel import SequenceParallel
from .waves import WaveTraining


if TYPE_CHECKING:
    from peft import PeftModel

Loss: TypeAlias = torch.Tensor | tuple[torch.Tensor, ModelOutput]
"""What `compute_loss` returns: a scalar, with the model's outputs if they are asked for."""


class TreeLoss:
    """
    Enables trees in a model, and computes TRL's loss on them: at once, in waves, or shared among ranks.

    `compute_loss_func` is the user's own; `router_loss_coef` is only given if a load-balancing loss is trained. A
    model that a single pass would train incorrectly raises `UnsupportedModelError`, a setting that does not work with
    waves or with shared rows `ValueError`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: SFTConfig,
        accelerator: Accelerator,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        router_loss_coef: float | None = None,
    ) -> None:
        enable_tree(model)
        self._model, self._args, self._compute_loss_func = model, args, compute_loss_func
        self._accelerator = accelerator
        self._reads_images = False
        self.waves: WaveTraining | None = None
        self.sequence_parallel: SequenceParallel | None = None
        recorder, coef = None, router_loss_coef or 0.0
        shares_rows = getattr(accelerator.parallelism_config, "sp_size", 1) > 1
        if router_loss_coef is not None and (shares_rows or args.wave_tokens is not None):
            recorder = RouterRecorder(without_adapters(model))
        if args.wave_tokens is not None:
            self.waves = WaveTraining(model, args, accelerator, compute_loss_func, recorder, coef)
        if shares_rows:
            self.sequence_parallel = SequenceParallel(model, args, accelerator, recorder, coef)
        for setting, is_set in (
            ("log_turn_metrics", args.log_turn_metrics),
            ("wave_tokens", args.wave_tokens is not None),
            ("sp_size", shares_rows),
        ):
            if is_set:
                refuse_own_calls(without_adapters(model), setting)

    def read_images(self, collator: DataCollatorForSinglePass, tp_size: int, *datasets: Rows) -> None:
        """
        Make the model and the collator read images, if any of the prepared datasets has rows with images.

        The collator is changed in place; `tp_size` ranks share the layers of the model.
        """
        if not self._reads_images and show_images(*datasets):
            read_images(self._model, self._args, self._accelerator, collator, tp_size)
            self._reads_images = True

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
        if self.sequence_parallel is not None and row.is_shared:
            return self._shared_loss(self.sequence_parallel, compute_loss, model, batch, context)
        forward: Forward = model
        if self.waves is not None:
            forward = self.waves.wrap(model, as_tree(row), batch, context)
        router_loss, num_items = RouterLossScale(row), context.num_items
        forward = self._measured(router_loss.wrap(forward), row, context)
        if row.loss_weights is not None:
            check_weights_reach_the_loss(self._args, self._compute_loss_func)
            # Normalised here, so that TRL's guard against division by a sum below 1 changes nothing.
            forward = weighted_model(forward, normalized(row.loss_weights, num_items))
            num_items = None if num_items is None else 1
        loss = compute_loss(forward, {**batch, "tree": row.handled()}, return_outputs, num_items)
        if self.waves is not None:
            self.waves.check_loss(loss[0] if isinstance(loss, tuple) else loss)
        router_loss.log_mean(context.metrics, self._accelerator)
        return loss

    def _shared_loss(
        self,
        sequence_parallel: SequenceParallel,
        compute_loss: Callable[..., Loss],
        model: Any,
        batch: Batch,
        context: LossContext,
    ) -> torch.Tensor:
        """Return the loss of a row that ranks share."""
        row: RowTree = batch["tree"]
        sequence_parallel.watch_gradients(model)
        tree, router_loss = as_tree(row, sequence_parallel.group), RouterLossScale(row)
        forward: Forward = (
            sequence_parallel.wrap(model, tree) if self.waves is None else self.waves.wrap(model, tree, batch, context)
        )
        forward = self._measured(router_loss.wrap(forward), row, context)
        if row.loss_weights is not None:
            forward = weighted_model(forward, row.loss_weights)
        loss = sequence_parallel.loss(compute_loss, model, forward, batch, context)
        if self.waves is not None:
            self.waves.check_loss(loss)
        router_loss.log_mean(context.metrics, self._accelerator)
        return loss

    @staticmethod
    def _measured(forward: Forward, row: RowTree, context: LossContext) -> Forward:
        """Return the model with its losses summed by turn, if these are logged."""
        if context.turn_metrics is None:
            return forward
        return context.turn_metrics.wrap(forward, row.label_parts, row.loss_weights)
