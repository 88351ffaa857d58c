"""What of a trainer depends on the number of processes: how rows reach them, and what a step is divided by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from .compatibility import check_loss_is_divided
from .evaluation import without_repeated_examples
from .loss import step_weight
from .progress import RowCounts
from .sequence_parallel import SequenceParallel
from .sharded_head import gather_head_with_model
from .stream_epochs import StepsOfStream, position_in_stream, stream_loader


class DistributedTrainer(SFTTrainer):
    """TRL's trainer, where several processes train rows of trees."""

    data_collator: Any
    train_dataset: Any
    _sequence_parallel: SequenceParallel | None = None
    _counts: RowCounts
    _is_evaluating = False
    _trains_turns: bool
    _steps_of_stream: StepsOfStream | None = None

    def get_train_dataloader(self) -> Any:
        """
        Return the dataloader of the training set.

        An epoch of a stream is its rows, once, on any number of ranks. Ranks that share rows take theirs in turn from
        streams that start again, so that none of them waits for rows that do not come.
        """
        stream, self._steps_of_stream = self.train_dataset, None
        if isinstance(stream, Sized) or not self._trains_turns:
            return super().get_train_dataloader()
        if self._sequence_parallel is None:
            self._steps_of_stream = StepsOfStream(self)
            return stream_loader(self)
        self.train_dataset = stream.repeat(None)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = stream

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        state = (max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial)
        position: tuple[int, int] = super()._init_training_state(*state)
        saved = None if checkpoint is None else Path(checkpoint, TRAINER_STATE_NAME)
        if self._steps_of_stream is None or saved is None or not saved.is_file():
            return position
        args = self.args
        epochs, batches = position_in_stream(TrainerState.load_from_json(str(saved)), args.gradient_accumulation_steps)
        return epochs, 0 if args.ignore_data_skip else batches

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model, loader = super()._prepare_for_training(*args, **kwargs)
        gather_head_with_model(self.model)
        return model, loader if self._sequence_parallel is None else self._sequence_parallel.connect(loader)

    def get_batch_samples(self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, *args: Any) -> Any:
        """
        Return the batches of a step, and what their loss is divided by.

        Args:
            epoch_iterator (`Iterator[dict[str, Any]]`):
                Batches of the epoch.
            num_batches (`int`):
                Batches of the step.
            *args (`Any`):
                Further arguments of [`~transformers.Trainer.get_batch_samples`].

        Returns:
            `tuple[list[dict[str, Any]], torch.Tensor or int or None]`: Batches, and the sum of their loss weights.
        """
        if self._steps_of_stream is not None:
            epoch_iterator = self._steps_of_stream.fill_up(epoch_iterator, num_batches)
        return super().get_batch_samples(map(self._without_repeated_rows, epoch_iterator), num_batches, *args)

    def _without_repeated_rows(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Leave out what accelerate repeats to fill up the last batch of an epoch."""
        num_rows = self._num_rows_to_fill_up
        if num_rows == 0 or "shift_labels" in batch:  # parts of rows were seen to when they were whole
            return batch
        return without_repeated_examples(batch, self.accelerator, self._train_batch_size, num_rows)

    @property
    def _num_rows_to_fill_up(self) -> int:
        """Rows of an epoch, to which accelerate adds some where ranks lack any; 0 if it does not."""
        args = self.args
        if args.dataloader_drop_last or args.train_sampling_strategy == "batch_rebalance":
            return 0
        return len(self.train_dataset) if isinstance(self.train_dataset, Sized) else 0

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """
        Return the number of steps, and what else follows from arguments and data.

        Args:
            args (`transformers.TrainingArguments`):
                Arguments of the run.
            dataloader (`torch.utils.data.DataLoader`):
                Data loader of the training set.

        Returns:
            `tuple`: As [`~transformers.Trainer.set_initial_training_values`] does.
        """
        values = super().set_initial_training_values(args, dataloader)
        if self._sequence_parallel is None:
            return values
        num_new = self._num_rows_to_fill_up % self.accelerator.num_processes
        num_empty = max(self._sequence_parallel.size - num_new, 0) if num_new else 0
        return without_last_batches(num_empty, values, args)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save, then wait: the first rank goes on to write the file that says that the checkpoint is whole."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        if "loss_weights" in inputs:  # under DeepSpeed, the Trainer rounds floats to the model's precision
            prepared["loss_weights"] = inputs["loss_weights"].to(self.args.device)
        return prepared

    def _count_every_step(self) -> None:
        """
        Make the Trainer leave the divisor of a step's loss to this one, whatever the model's class says of itself.

        With `accepts_loss_kwargs = False`, a model's own loss is the mean of a batch: the Trainer counts no items, and
        divides by the number of accumulated batches. The loss here is TRL's, of log probabilities per token.
        """
        if not self._shares_rows:  # whose loss undoes what the Trainer divides by
            check_loss_is_divided(self)
            self.model_accepts_loss_kwargs = True

    @property
    def _shares_rows(self) -> bool:
        return getattr(self.accelerator.parallelism_config, "sp_size", 1) > 1

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Sum of the loss weights of a step on all ranks: the number of trained tokens where all weights are 1."""
        if not any("tree_plan" in batch for batch in batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        if self._is_evaluating:
            return None  # `evaluation_loop` pools batch means, so each has to be the mean of its own batch
        own = step_weight(batch_samples).to(device)
        everyone = self.accelerator.gather(own[None])
        num_items = everyone.sum() / self.get_tp_size()  # ranks that share layers have the same rows
        self._counts.add(batch_samples, num_items)
        if self.args.average_tokens_across_devices or self._shares_rows:
            return num_items
        # The mean over ranks of their own means. A rank that only has repeated rows has none, and does not count.
        return own * ((everyone > 0).sum() / len(everyone))


def without_last_batches(number: int, values: tuple[Any, ...], args: Any) -> tuple[Any, ...]:
    """
    Return the number of steps of a run without the last batches of each epoch.

    Ranks that share rows train each other's rows in turn. Where an epoch's last rows are fewer than the ranks that
    share them, the last turns repeat rows, and a step of nothing else must not be taken.

    Args:
        number (`int`):
            Batches to leave out.
        values (`tuple`):
            What [`~transformers.Trainer.set_initial_training_values`] returns.
        args (`transformers.TrainingArguments`):
            Arguments of the run.

    Returns:
        `tuple`: The same with fewer steps.
    """
    epochs, _, *others, batches, max_steps = values
    batches -= number
    steps = math.ceil(batches / args.gradient_accumulation_steps)
    if args.max_steps > 0:
        epochs = math.ceil(max_steps / steps)
    else:
        max_steps = math.ceil(args.num_train_epochs * steps)
    return epochs, steps, *others, batches, max_steps
