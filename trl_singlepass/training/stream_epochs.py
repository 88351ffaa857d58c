"""Epochs of a stream: each of its rows once, on any number of ranks, in whole steps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import send_to_device
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import TrainerState

from ..data.collator import DataCollatorForSinglePass
from ..trees.prefix_tree import IGNORE_INDEX
from ..trees.rows import Row
from .evaluation import data_ranks


# Settings of the Trainer that are torch's, behind "dataloader_"; older releases of transformers lack the last two.
_LOADER_SETTINGS = (
    "drop_last",
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "prefetch_factor",
    "multiprocessing_context",
    "in_order",
)


def stream_loader(trainer: Any) -> DataLoader[Any]:
    """
    Return the batches of a stream that this rank trains in an epoch.

    Accelerate would complete the last batches of all ranks with rows from the start of the stream. Here they end where
    the stream ends, and [`StepsOfStream`] keeps the ranks in step.

    Args:
        trainer (`transformers.Trainer`):
            Trainer on a stream of rows.

    Returns:
        `torch.utils.data.DataLoader`: The loader, as accelerate prepares those of one process.
    """
    args, accelerator = trainer.args, trainer.accelerator
    num_ranks, rank = data_ranks(accelerator)
    settings = {name: getattr(args, key) for name in _LOADER_SETTINGS if hasattr(args, key := f"dataloader_{name}")}
    loader: DataLoader[Any] = DataLoader(
        part_of_rank(trainer.train_dataset, num_ranks, rank),
        batch_size=trainer._train_batch_size // (num_ranks if accelerator.split_batches else 1),
        collate_fn=trainer.data_collator,
        **settings,
    )
    return prepare_data_loader(  # type: ignore[no-any-return]
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )


def part_of_rank(stream: IterableDataset, num_ranks: int, rank: int) -> IterableDataset:
    """Return the rows that one of several ranks reads: whole shards where there are enough, else every n-th row."""
    if num_ranks == 1:
        return stream
    if stream.num_shards >= num_ranks:
        return stream.shard(num_shards=num_ranks, index=rank)
    return split_dataset_by_node(stream, rank=rank, world_size=num_ranks)


class StepsOfStream:
    """
    Fills up the steps of a stream: its ranks end at different batches, and in the middle of an accumulated step.

    A rank without a batch, where some other has one, and a step that the stream cannot fill get a batch of two tokens
    without a target. The epoch ends when no rank has a batch left.

    Args:
        trainer (`transformers.Trainer`):
            Trainer on a stream of rows.
    """

    def __init__(self, trainer: Any) -> None:
        self._accelerator = trainer.accelerator
        self._blank = blank_batch(trainer._tokenizer.pad_token_id, trainer.args.pad_to_multiple_of)
        self._ended: Iterator[Any] | None = None

    def fill_up(self, epoch: Iterator[dict[str, Any]], num_batches: int) -> Iterator[dict[str, Any]]:
        """
        Return the batches of the next step.

        Args:
            epoch (`Iterator[dict[str, Any]]`):
                Batches of the epoch; the same object for all its steps.
            num_batches (`int`):
                Batches per step.

        Returns:
            `Iterator[dict[str, Any]]`: `num_batches` batches, or none at the end of the epoch.
        """
        if epoch is self._ended:  # the Trainer goes on asking, for as many steps as the run has
            return iter(())
        batches = list(islice(epoch, num_batches))
        if not self._any_rank_has(batches):
            self._ended = epoch
            return iter(())
        num_missing = num_batches - len(batches)
        return iter([*batches, *(self._new_blank() for _ in range(num_missing))])

    def _any_rank_has(self, batches: list[dict[str, Any]]) -> bool:
        if self._accelerator.num_processes == 1:
            return bool(batches)
        counts = self._accelerator.gather(torch.tensor([len(batches)], device=self._accelerator.device))
        return bool(counts.any())

    def _new_blank(self) -> dict[str, Any]:
        batch: dict[str, Any] = send_to_device(dict(self._blank), self._accelerator.device)
        return batch


def blank_batch(pad_token_id: int, pad_to_multiple_of: int | None = None) -> dict[str, Any]:
    """Return a batch of a row without targets: it takes part in a step, and adds nothing to loss and gradients."""
    tokens = np.zeros(2, np.int64)
    row = Row(
        input_ids=tokens + pad_token_id,
        subtree_end=tokens + 2,
        labels=tokens + IGNORE_INDEX,
        loss_weights=np.zeros(2),
        label_parts=tokens,
        multiplicity=tokens + 1,  # the load-balancing loss of experts is a mean over tokens that count
    )
    return DataCollatorForSinglePass(pad_token_id, pad_to_multiple_of)([row.columns()])


def position_in_stream(state: TrainerState, num_accumulated: int) -> tuple[int, int]:
    """
    Return where a saved run stood: the Trainer takes a stream for endless, and counts all steps to its first epoch.

    Args:
        state (`transformers.TrainerState`):
            State of the saved run: its `epoch` is the number of whole epochs, and a fraction that counts batches in
            units of all batches of the run.
        num_accumulated (`int`):
            Batches per step.

    Returns:
        `tuple[int, int]`: Whole epochs, and batches taken in the current one.
    """
    epochs = int(state.epoch or 0)
    return epochs, round(((state.epoch or 0) - epochs) * state.max_steps * num_accumulated)
