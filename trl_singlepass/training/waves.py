"""Waves in a trainer: how its rows are cut, and how its loss is scaled before the Trainer scales it."""

from __future__ import annotations

from typing import Any

import torch
import trl
from transformers import logging

from ..attention.context import Tree
from ..recurrent.layer_kinds import path_dependent_layers
from ..waves.engines import SHARDED, ShardedEngine, get_engine
from ..waves.loss import RouterRecorder, WaveLoss
from ..waves.model import WaveModel
from ..waves.plan import WavePlan
from ..waves.runner import WaveRunner
from .loss import total_weight
from .model import without_adapters
from .wave_budget import wave_tokens_that_fit
from .wave_compatibility import check_waves


logger = logging.get_logger(__name__)

# On an accelerator, waves of fewer tokens leave it idle, and running the history twice costs less.
SMALLEST_WAVE = 1024


class WaveTraining:
    """
    The waves of a trainer.

    Args:
        trainer (`SinglePassSFTTrainer`):
            Trainer, its model under tree attention. Without `wave_tokens`, rows run at once.

    Raises:
        `ValueError`: If a setting, the model or the engine does not work with waves; the message names it.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.runs_at_once = trainer.args.wave_tokens is None
        if not self.runs_at_once:
            check_waves(trainer)
        base = without_adapters(trainer.model)
        self.recorder = None if self.runs_at_once or not trainer.aux_loss_enabled else RouterRecorder(base)
        # Models take a lone token for a step of generation, and drop the mask that carries the tree to recomputation.
        self._is_hybrid = bool(path_dependent_layers(base))
        self._unchecked: WaveLoss | None = None
        self._is_checked = False
        self._wave_tokens: int | None = None if trainer.args.wave_tokens == "auto" else trainer.args.wave_tokens

    @property
    def wave_tokens(self) -> int:
        """Largest number of tokens that have activations at the same time."""
        if self._wave_tokens is None:
            self._wave_tokens, reason = wave_tokens_that_fit(self.trainer.model, self.trainer.args)
            logger.info(f"wave_tokens='auto' is {self._wave_tokens}: {reason}.")
        return self._wave_tokens

    def plan(self, tree: Tree) -> WavePlan:
        """
        Cut a row in waves.

        Args:
            tree (`Tree`):
                Tree of the row.
        """
        on_cpu = self.trainer.args.device.type == "cpu"
        # The load-balancing loss has to know all of the row before the first backward: history runs then anyway.
        # Engines that shard the model need all forwards without a backward first.
        keep = self.recorder is None and self.trainer.accelerator.distributed_type not in SHARDED
        smallest = 1 if on_cpu else SMALLEST_WAVE
        return WavePlan.from_tree_plan(
            tree.plan,
            self.wave_tokens,
            keep_history=keep,
            smallest_wave=smallest,
            allow_single_tokens=not self._is_hybrid,
        )

    def over(self, model: Any, tree: Tree, inputs: dict[str, Any], num_items: Any) -> Any:
        """
        Return the model as it runs a row: wave by wave, or as it is where the row fits in one.

        Args:
            model (`torch.nn.Module`):
                Model, as the Trainer wrapped it.
            tree (`Tree`):
                Tree of the row.
            inputs (`dict[str, Any]`):
                Batch of the collator.
            num_items (`torch.Tensor` or `int`, *optional*):
                Sum of the loss weights over the whole step, as the Trainer hands it to `compute_loss`.
        """
        if self.runs_at_once:
            return model
        trainer, plan = self.trainer, self.plan(tree)
        if trainer.model.training:
            logger.info(f"Step {trainer.state.global_step + 1}: {plan}.")
        mode = "train" if trainer.model.training else "eval"
        trainer._metrics[mode]["num_waves"].append(float(len(plan.waves)))
        engine = get_engine(model, trainer.accelerator, self._scale())
        if len(plan.waves) == 1 and not isinstance(engine, ShardedEngine):
            return model
        balance = None if self.recorder is None else self.recorder.new_row()
        steps = trainer.current_gradient_accumulation_steps if num_items is not None and trainer.model.training else 1
        loss = WaveLoss(
            self._coefficients(inputs, num_items),
            is_dft=trainer.args.loss_type == "dft",
            load_balancing=balance,
            load_balancing_coefficient=0.0 if balance is None else trainer.router_aux_loss_coef / steps,
        )
        self._unchecked = loss if trainer.model.training else None
        row = WaveRunner(plan, tree, trainer.args.offload_kv)
        return WaveModel(engine, row, loss, self.recorder)

    def check_loss(self, result: Any) -> None:
        """
        Check, once in a run, that the losses of the waves add up to the loss of the row that TRL computed.

        Args:
            result (`torch.Tensor` or `tuple`):
                What `compute_loss` returned.

        Raises:
            `RuntimeError`: If they do not; the gradients of the waves would be those of another loss.
        """
        loss, self._unchecked = self._unchecked, None
        if loss is None or self._is_checked:
            return
        expected = float((result[0] if isinstance(result, tuple) else result).detach())
        if abs(float(loss.total) - expected) > 1e-3 * abs(expected):
            raise RuntimeError(
                f"The waves of a row have a loss of {float(loss.total):.6g}, TRL {trl.__version__} computes "
                f"{expected:.6g}: it no longer is the loss that waves send back. Set wave_tokens=None."
            )
        self._is_checked = True

    def _coefficients(self, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        """Factor of each position's target in the loss that TRL computes, shape `(1, row_length)`."""
        labels = inputs["labels"]
        weights = inputs.get("loss_weights", (labels != -100).float())
        total = total_weight(inputs) if num_items is None else num_items
        total = torch.as_tensor(total, device=labels.device)
        ranks = 1
        if self.trainer.args.average_tokens_across_devices and num_items is not None:
            ranks = self.trainer.accelerator.num_processes
        # TRL's guard against division by zero; weighted losses are normalised before it.
        total = total if "loss_weights" in inputs else total.clamp(min=1)
        return torch.cat([weights[:, 1:], torch.zeros_like(weights[:, :1])], dim=1) * ranks / total

    def _scale(self) -> float:
        """What `Trainer.training_step` multiplies the loss with before it sends gradients back."""
        is_scaled = getattr(self.trainer, "loss_is_scaled_for_ga", None) is not False
        if is_scaled or not self.trainer.model.training:
            return 1.0
        return 1 / int(self.trainer.current_gradient_accumulation_steps)
