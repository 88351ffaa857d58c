"""What of a trainer depends on the number of processes: how rows reach them, and what a step is divided by."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer

from .loss import step_weight
from .progress import RowCounts
from .sequence_parallel import SequenceParallel


class DistributedTrainer(SFTTrainer):
    """TRL's trainer, where several processes train rows of trees."""

    data_collator: Any
    train_dataset: Any
    _sequence_parallel: SequenceParallel | None = None
    _counts: RowCounts
    _is_evaluating = False

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model, loader = super()._prepare_for_training(*args, **kwargs)
        return model, loader if self._sequence_parallel is None else self._sequence_parallel.connect(loader)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        if "loss_weights" in inputs:  # under DeepSpeed, the Trainer rounds floats to the model's precision
            prepared["loss_weights"] = inputs["loss_weights"].to(self.args.device)
        return prepared

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Sum of the loss weights of a step on all ranks: the number of trained tokens where all weights are 1."""
        has_trees = any("tree_plan" in batch for batch in batch_samples)
        if self._is_evaluating and has_trees:
            return None  # `evaluation_loop` pools batch means, so each has to be the mean of its own batch
        num_items = super()._get_num_items_in_batch(batch_samples, device)
        shares_rows = self._sequence_parallel is not None
        if not has_trees or (num_items is None and not shares_rows):
            return num_items
        is_weighted = any("loss_weights" in batch for batch in batch_samples)
        if is_weighted or self.accelerator.num_processes > 1:  # whether some other rank has weights is not known here
            counts_all_ranks = shares_rows or self.args.average_tokens_across_devices
            num_items = step_weight(batch_samples, self.accelerator if counts_all_ranks else None).to(device)
        self._counts.add(batch_samples, num_items)
        return num_items
