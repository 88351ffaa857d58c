"""What a trainer measures: the loss of an evaluation set, counts of rows, loss and accuracy by turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .distributed import DistributedTrainer
from .evaluation import PooledLoss, without_repeated_examples
from .loss import total_weight
from .prediction_rows import per_example
from .progress import RowCounts
from .turn_metrics import TurnMetrics


class MeasuringTrainer(DistributedTrainer):
    """TRL's trainer on rows of trees, with metrics that are pooled over tokens."""

    _pooled_loss: PooledLoss
    _turns: TurnMetrics | None

    def _start_measuring(self) -> None:
        self._counts = RowCounts()
        self._pooled_loss = PooledLoss(self.args.device)
        self._turns = self._new_turn_metrics()

    def _new_turn_metrics(self) -> TurnMetrics | None:
        return TurnMetrics(self.args.device) if self.args.log_turn_metrics else None

    def _by_turn(
        self, model: Callable[..., Any], label_parts: torch.Tensor, loss_weights: torch.Tensor | None
    ) -> Callable[..., Any]:
        """Return the model, its losses added up by turn if that is asked for."""
        return model if self._turns is None else self._turns.over(model, label_parts, loss_weights)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """
        Evaluate one batch, and add its loss to the pooled one.

        Args:
            model (`torch.nn.Module`):
                Model, as the Trainer wrapped it.
            inputs (`dict[str, Any]`):
                Batch of the collator.
            prediction_loss_only (`bool`):
                Whether to return the loss only.
            ignore_keys (`list[str]`, *optional*):
                Outputs to leave out.

        Returns:
            `tuple`: Loss, logits and labels, the last two with one row per example.
        """
        if "tree_plan" in inputs:
            inputs = without_repeated_examples(inputs, self.accelerator, self.args.eval_batch_size)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if "tree_plan" in inputs and loss is not None:
            self._pooled_loss.add(loss, total_weight(inputs))
        if "tree_plan" in inputs and logits is not None:
            logits, labels = per_example(logits, inputs), per_example(labels, inputs)
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """
        Evaluate a dataset; the loss is the mean over all its trained tokens, not a mean of batch means.

        Args:
            *args (`Any`):
                Arguments of [`~transformers.Trainer.evaluation_loop`].
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Prefix of the metrics' names.
            **kwargs (`Any`):
                Further arguments of [`~transformers.Trainer.evaluation_loop`].

        Returns:
            `transformers.trainer_utils.EvalLoopOutput`: Predictions and metrics.
        """
        self._pooled_loss = PooledLoss(self.args.device)
        turns_of_training, self._turns = self._turns, self._new_turn_metrics()
        self._is_evaluating = True
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            by_turn = self._turns.pop(self.accelerator) if self._turns is not None else {}
        finally:
            self._is_evaluating = False
            self._turns = turns_of_training
        loss = self._pooled_loss.mean(self.accelerator)
        if loss is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in by_turn.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Log, with the sharing factor, the tokens trained so far and, if asked for, metrics by turn.

        Args:
            logs (`dict[str, float]`):
                Values to log.
            start_time (`float`, *optional*):
                Start of the run, in seconds.
        """
        if self.model.training:
            logs.update(self._counts.pop_logs())
            if self._turns is not None:
                logs.update(self._turns.pop(self.accelerator))
        super().log(logs, start_time)
