"""Epochs of a stream: each of its rows once, on any number of ranks, in complete steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import send_to_device
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..data.collator import Batch, DataCollatorForSinglePass
from ..trees.image_features import NO_FEATURE
from ..trees.prefix_tree import IGNORE_INDEX
from ..trees.rows import Row
from .last_batch import data_ranks


# torch's settings that the Trainer has with a "dataloader_" prefix; older releases of transformers lack the last two.
_LOADER_SETTINGS = (
    "drop_last",
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "prefetch_factor",
    "multiprocessing_context",
    "in_order",
)


@contextmanager
def endless_stream(trainer: Any) -> Iterator[None]:
    """Let the stream of a trainer start again where it ends."""
    stream = trainer.train_dataset
    trainer.train_dataset = stream.repeat(None)
    try:
        yield
    finally:
        trainer.train_dataset = stream


def stream_dataloader(
    stream: IterableDataset,
    collate: Callable[..., Batch],
    args: TrainingArguments,
    accelerator: Accelerator,
    batch_size: int,
) -> DataLoader[Batch]:
    """
    Return the batches of a stream that this rank trains in an epoch.

    accelerate would complete the last batches of all ranks with rows from the start of the stream. Here they end where
    the stream ends, and [`StreamSteps`] keeps the ranks in step.

    `batch_size` counts the rows of a batch; with `split_batches`, those of all ranks together. The loader is prepared
    as accelerate does it for a single process.
    """
    num_ranks, rank = data_ranks(accelerator)
    settings = {name: getattr(args, key) for name in _LOADER_SETTINGS if hasattr(args, key := f"dataloader_{name}")}
    loader: DataLoader[Batch] = DataLoader(
        part_of_rank(stream, num_ranks, rank),
        batch_size=batch_size // (num_ranks if accelerator.split_batches else 1),
        collate_fn=collate,
        **settings,
    )
    return prepare_data_loader(  # type: ignore[no-any-return]
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )


def part_of_rank(stream: IterableDataset, num_ranks: int, rank: int) -> IterableDataset:
    """Return the rows that one of several ranks reads: whole shards if there are enough, else every n-th row."""
    if num_ranks == 1:
        return stream
    if stream.num_shards >= num_ranks:
        return stream.shard(num_shards=num_ranks, index=rank)
    return split_dataset_by_node(stream, rank=rank, world_size=num_ranks)


class StreamSteps:
    """
    Completes the steps of a stream, where ranks run out of batches at different times, or in an accumulated step.

    A rank that has no batch left while another has one, or in a step that it cannot complete, receives a batch of two
    tokens without a target. The epoch ends when no rank has a batch left. `blank` is the batch without a target.
    """

    def __init__(self, accelerator: Accelerator, blank: Batch) -> None:
        self._accelerator, self._blank = accelerator, blank
        self._ended: Iterator[Batch] | None = None

    def complete(self, epoch: Iterator[Batch], num_batches: int) -> Iterator[Batch]:
        """
        Return the batches of the next step: `num_batches`, or none at the end of the epoch. `epoch` is the same
        iterator for all steps of an epoch.
        """
        if epoch is self._ended:  # the Trainer goes on asking, for as many steps as the run has
            return iter(())
        batches = list(islice(epoch, num_batches))
        if not self._any_rank_has(batches):
            self._ended = epoch
            return iter(())
        num_missing = num_batches - len(batches)
        return iter([*batches, *(self._new_blank() for _ in range(num_missing))])

    def _any_rank_has(self, batches: list[Batch]) -> bool:
        if self._accelerator.num_processes == 1:
            return bool(batches)
        counts = self._accelerator.gather(torch.tensor([len(batches)], device=self._accelerator.device))
        return bool(counts.any())

    def _new_blank(self) -> Batch:
        batch: Batch = send_to_device(dict(self._blank), self._accelerator.device)
        return batch


def blank_batch(collator: DataCollatorForSinglePass) -> Batch:
    """Return a batch of one row without targets: it completes a step, and adds nothing to loss or gradients."""
    tokens = np.zeros(2, np.int64)
    row = Row(
        input_ids=tokens + collator.pad_token_id,
        subtree_end=tokens + 2,
        labels=tokens + IGNORE_INDEX,
        loss_weights=np.zeros(2),
        label_parts=tokens,
        multiplicity=tokens
        + 1,  # the load-balancing loss of experts, even where it has no effect, is a mean over them
        image_features=None if collator.blank_image is None else tokens + NO_FEATURE,
    )
    batch = collator([row.columns()])
    return {**batch, "tree": batch["tree"].replace(is_blank=True)}


def position_in_stream(checkpoint: str | None, args: TrainingArguments) -> tuple[int, int] | None:
    """
    Return where in a stream a saved run stood. The Trainer takes a stream to be endless, with all steps in one epoch.

    The `epoch` of the saved state is the number of whole epochs, and a fraction that counts batches in units of all
    batches of the run: with `max_steps=10` and 2 batches per step, 2.35 is 2 epochs and 0.35 · 20 = 7 batches.

    Returns whole epochs, and batches to skip in the current one; `None` without a checkpoint that says so.
    """
    if checkpoint is None or not (saved := Path(checkpoint, TRAINER_STATE_NAME)).is_file():
        return None
    state = TrainerState.load_from_json(str(saved))
    epochs, fraction = divmod(state.epoch or 0, 1)
    batches = round(fraction * state.max_steps * args.gradient_accumulation_steps)
    return int(epochs), 0 if args.ignore_data_skip else batches
