"""TRL's loss on the tree of a row: what is put around the model while TRL computes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl import SFTConfig

from ..attention import Tree, tree_context
from ..data.collator import Batch, DataCollatorForSinglePass
from ..images.reading import ImageReader
from ..waves.loss import RouterRecorder
from .compatibility import check_weights_reach_the_loss
from .images import Rows, read_images, show_images
from .loss import LossContext, RouterLossScale, normalized, weighted_model
from .model import Forward, check_every_layer_attended, enable_tree, without_adapters
from .sequence_parallel import SequenceParallel
from .waves import WaveTraining


if TYPE_CHECKING:
    from peft import PeftModel

Loss: TypeAlias = torch.Tensor | tuple[torch.Tensor, ModelOutput]
"""What `compute_loss` returns: a scalar, with the model's outputs if they are asked for."""

# Inputs that neither TRL nor a model knows.
_TREE_INPUTS = frozenset(
    {
        "tree_plan", "subtree_end", "label_parts", "loss_weights", "image_features", "image_inputs",
        "rope_position_ids", "is_shared", "is_blank", "router_loss_scale",
    }
)  # fmt: skip


class TreeLoss:
    """
    Enables trees in a model, and computes TRL's loss on them: at once, in waves, or shared among ranks.

    Args:
        model (`transformers.PreTrainedModel`, `peft.PeftModel`):
            Model to train.
        args (`SinglePassSFTConfig`):
            Arguments of the run.
        accelerator (`accelerate.Accelerator`):
            Accelerator of the run.
        compute_loss_func (`Callable`, *optional*):
            The user's own loss function.
        router_loss_coef (`float`, *optional*):
            Coefficient of the load-balancing loss of a mixture of experts, if it is trained.

    Raises:
        `UnsupportedModelError`: If a single pass would train the model incorrectly.
        `ValueError`: If a setting does not work with waves or with shared rows.
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
        self._layers_are_checked = False
        self._accelerator = accelerator
        self._image_reader: ImageReader | None = None
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

    def read_images(self, collator: DataCollatorForSinglePass, tp_size: int, *datasets: Rows) -> None:
        """
        Make the model and the collator read images, if datasets have rows with images.

        Args:
            collator ([`DataCollatorForSinglePass`]):
                Collator of the rows, changed in place.
            tp_size (`int`):
                Number of ranks that share the layers of the model.
            *datasets (`datasets.Dataset`, `datasets.IterableDataset`, `dict` of these, *optional*):
                Prepared datasets.

        Raises:
            `ValueError`: If the model, a setting or the engine does not go with images.
        """
        if self._image_reader is None and show_images(*datasets):
            self._image_reader = read_images(self._model, self._args, self._accelerator, collator, tp_size)

    def compute(
        self,
        compute_loss: Callable[..., Loss],
        model: nn.Module,
        batch: Batch,
        return_outputs: bool,
        context: LossContext,
    ) -> Loss:
        """
        Return the loss of a batch with a `tree_plan`.

        Args:
            compute_loss (`Callable`):
                TRL's `compute_loss`.
            model (`torch.nn.Module`):
                Model, as the Trainer wrapped it.
            batch (`Batch`):
                Batch of the collator.
            return_outputs (`bool`):
                Whether to return the model's outputs as well.
            context (`LossContext`):
                How the loss is scaled, and where metrics go.

        Returns:
            `torch.Tensor` or `tuple`: The loss, with the outputs if asked for.
        """
        loss: Loss
        inputs = {name: value for name, value in batch.items() if name not in _TREE_INPUTS}
        router_loss = RouterLossScale(batch)
        if self.sequence_parallel is not None and "is_shared" in batch:
            with self.sequence_parallel.run_on_tree(batch["tree_plan"]) as tree:
                loss = self._shared_loss(
                    self.sequence_parallel, compute_loss, model, batch, inputs, tree, context, router_loss
                )
        else:
            shown: AbstractContextManager[None] = nullcontext()
            if "image_features" in batch:
                if self._image_reader is None:
                    raise ValueError(
                        "The model was not made to read images, because neither train_dataset nor eval_dataset had "
                        "any when the trainer was made. Pass rows with images as one of them."
                    )
                inputs |= self._image_reader.model_inputs(batch)
                shown = self._image_reader.showing(batch)
            with shown, tree_context(batch["tree_plan"], batch["subtree_end"], batch["position_ids"]) as tree:
                forward: Forward = model if self.waves is None else self.waves.wrap(model, tree, batch, context)
                forward = router_loss.wrap(forward)
                if context.turn_metrics is not None:
                    forward = context.turn_metrics.wrap(forward, batch["label_parts"], batch.get("loss_weights"))
                num_items = context.num_items
                if "loss_weights" in batch:
                    check_weights_reach_the_loss(self._args, self._compute_loss_func)
                    # Normalised here, so that TRL's guard against division by a sum below 1 changes nothing.
                    forward = weighted_model(forward, normalized(batch["loss_weights"], num_items))
                    num_items = None if num_items is None else 1
                loss = compute_loss(forward, inputs, return_outputs, num_items)
                if self.waves is not None:
                    self.waves.check_loss(loss[0] if isinstance(loss, tuple) else loss)
        router_loss.log_mean(context.metrics, self._accelerator)
        self._check_layers_once(tree)
        return loss

    def _shared_loss(
        self,
        sequence_parallel: SequenceParallel,
        compute_loss: Callable[..., Loss],
        model: Any,
        batch: Batch,
        inputs: Batch,
        tree: Tree,
        context: LossContext,
        router_loss: RouterLossScale,
    ) -> torch.Tensor:
        """Return the loss of a row that ranks share."""
        sequence_parallel.watch_gradients(model)
        forward: Forward = (
            sequence_parallel.wrap(model) if self.waves is None else self.waves.wrap(model, tree, batch, context)
        )
        forward = router_loss.wrap(forward)
        if context.turn_metrics is not None:
            forward = context.turn_metrics.wrap(forward, batch["label_parts"], batch.get("loss_weights"))
        if "loss_weights" in batch:
            forward = weighted_model(forward, batch["loss_weights"])
        loss = sequence_parallel.loss(compute_loss, model, forward, inputs, context)
        if self.waves is not None:
            self.waves.check_loss(loss)
        return loss

    def _check_layers_once(self, tree: Tree) -> None:
        if not self._layers_are_checked:
            check_every_layer_attended(without_adapters(self._model), tree)
            self._layers_are_checked = True
