"""Training in waves (`wave_tokens`): how a row is cut, and how its loss is scaled before the Trainer scales it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import trl
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, logging
from trl import SFTConfig

from ..attention.context import Tree
from ..attention.row_group import RowGroup
from ..data.collator import Batch
from ..engine.enable import Forward, without_adapters
from ..recurrent.introspection import path_dependent_layers
from ..trees.prefix_tree import IGNORE_INDEX
from ..waves.engines import SHARDED, ShardedEngine, get_engine
from ..waves.loss import RouterRecorder, WaveLoss
from ..waves.model import WaveModel
from ..waves.plan import WavePlan
from ..waves.runner import WaveRunner
from .gradient_scale import get_gradient_scale
from .loss import LossContext, NumItems, total_weight
from .refusals import check_parts
from .sharding import stop_prefetching
from .situation import Situation
from .wave_budget import on_shared_rows, wave_tokens_that_fit


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)

# On an accelerator, waves of fewer tokens leave it idle, and running the history twice costs less.
SMALLEST_WAVE = 1024


class WaveTraining:
    """
    Runs the rows of a trainer wave by wave.

    Takes a model with trees enabled. `recorder` holds the router logits of a mixture of experts whose load-balancing
    loss is trained. What does not work with waves raises `ValueError`: a setting, the model, the engine, any
    `compute_loss_func`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: SFTConfig,
        accelerator: Accelerator,
        compute_loss_func: Callable[..., object] | None = None,
        recorder: RouterRecorder | None = None,
        router_loss_coef: float = 0.0,
    ) -> None:
        stop_prefetching(accelerator)
        check_parts(Situation(args, model, accelerator, compute_loss_func=compute_loss_func))
        self._model, self._args, self._accelerator = model, args, accelerator
        self._recorder, self._router_loss_coef = recorder, router_loss_coef
        # Models take a lone token for a step of generation, and drop the mask that carries the tree to recomputation.
        self._is_hybrid = bool(path_dependent_layers(without_adapters(model)))
        self._unchecked: WaveLoss | None = None
        self._is_checked = False
        self._wave_tokens: int | None = None if args.wave_tokens == "auto" else args.wave_tokens

    @property
    def wave_tokens(self) -> int:
        """Largest number of tokens that have activations at the same time."""
        if self._wave_tokens is None:
            tokens, reason = wave_tokens_that_fit(self._model, self._args)
            self._wave_tokens = on_shared_rows(tokens, self._accelerator, divides_layers=not self._is_hybrid)
            logger.info(f"wave_tokens='auto' is {self._wave_tokens}: {reason}.")
        return self._wave_tokens

    def plan(self, tree: Tree) -> WavePlan:
        """Return the waves of a row, by its tree."""
        # History runs again after the waves if the load-balancing loss has to see the whole row before the first
        # backward, or if the engine shards the model and needs all forwards without a backward first.
        keep_history = self._recorder is None and self._accelerator.distributed_type not in SHARDED
        return WavePlan.from_tree_plan(
            tree.plan,
            self.wave_tokens,
            keep_history=keep_history,
            smallest_wave=1 if self._args.device.type == "cpu" else SMALLEST_WAVE,
            allow_single_tokens=not self._is_hybrid,
        )

    def wrap(self, model: nn.Module, tree: Tree, batch: Batch, context: LossContext) -> Forward:
        """
        Return the model as it runs a row: wave by wave, or as it is if one wave holds the row. The number of waves is
        logged in the metrics of `context`.
        """
        plan = self.plan(tree)
        if self._model.training:
            logger.info(f"Step {context.step}: {plan}.")
        context.metrics["num_waves"].append(float(len(plan.waves)))
        scale = 1 / context.divisor
        if tree.group is not None:
            scale /= get_gradient_scale(model, tree.group.size)
        engine = get_engine(model, self._accelerator, scale, tree.group)
        if len(plan.waves) == 1 and not isinstance(engine, ShardedEngine):
            return model
        load_balancing = None if self._recorder is None else self._recorder.new_row(tree.group)
        loss = WaveLoss(
            self._loss_coefficients(batch, context.num_items, tree.group),
            is_dft=self._args.loss_type == "dft",
            load_balancing=load_balancing,
            load_balancing_coefficient=batch["tree"].router_loss_scale * self._router_loss_coef / context.num_batches,
        )
        self._unchecked = loss if self._model.training else None
        return WaveModel(engine, WaveRunner(plan, tree, self._args.offload_kv), loss, self._recorder)

    def check_loss(self, loss: torch.Tensor) -> None:
        """
        Check, in the first step of a run, that the losses of the waves add up to the row's loss.

        Takes the loss that TRL computed from the outputs of the whole row, a scalar. If they do not add up to it, the
        gradients of the waves would be those of another loss: this raises `RuntimeError`.
        """
        waves, self._unchecked = self._unchecked, None
        if waves is None or self._is_checked:
            return
        expected = float(loss.detach())
        if abs(float(waves.total) - expected) > 1e-3 * abs(expected):
            raise RuntimeError(
                f"The waves of a row have a loss of {float(waves.total):.6g}, but TRL {trl.__version__} computes "
                f"{expected:.6g}: the loss whose gradients waves compute is no longer TRL's. Set wave_tokens=None."
            )
        self._is_checked = True

    def _loss_coefficients(self, batch: Batch, num_items: NumItems, group: RowGroup | None) -> torch.Tensor:
        """Return the factor of each position's target in the loss that TRL computes, shape `(1, row_length)`."""
        labels, given = batch["labels"], batch["tree"].loss_weights
        weights = (labels != IGNORE_INDEX).float() if given is None else given
        total = total_weight(batch) if num_items is None else num_items
        total = torch.as_tensor(total, device=labels.device)
        ranks = 1
        if group is not None:  # their loss is divided by the weights of all ranks in any case
            ranks = self._accelerator.num_processes // group.size
        elif self._args.average_tokens_across_devices and num_items is not None:
            ranks = self._accelerator.num_processes
        # TRL's guard against division by zero; weighted losses are normalised before it.
        total = total.clamp(min=1) if given is None else total
        return torch.cat([weights[:, 1:], torch.zeros_like(weights[:, :1])], dim=1) * ranks / total
