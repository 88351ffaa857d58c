"""
The ends of epochs: each example is trained once, on any number of ranks, in complete steps.

Several ranks need a batch each, so accelerate completes the last batches of an epoch with examples of the start. Those
of stored datasets lose their targets here, and streams have a loader of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Sized
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
from ..data.row_tree import RowTree
from ..trees.image_features import NO_FEATURE
from ..trees.prefix_tree import IGNORE_INDEX
from ..trees.rows import Row


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


def data_ranks(accelerator: Accelerator) -> tuple[int, int]:
    """
    Return how many ranks receive batches of their own, and which of them this one is.

    Ranks that share the layers of a model (tensor parallelism) share batches: of 8 ranks with `tp_size=2`, 4 do, and
    rank 5 is number 2 of them.
    """
    size = getattr(accelerator.parallelism_config, "tp_size", None) or 1
    return accelerator.num_processes // size, accelerator.process_index // size


# Stored datasets -----------------------------------------------------------------------------------------------------


def num_repeatable_examples(dataset: object, args: TrainingArguments) -> int:
    """Return the number of examples of a training set that accelerate may complete with repetitions, else 0."""
    if args.dataloader_drop_last or args.train_sampling_strategy == "batch_rebalance":
        return 0
    return len(dataset) if isinstance(dataset, Sized) else 0


def without_repeated_examples(
    batch: Batch, accelerator: Accelerator, batch_size: int, num_examples: int | None = None
) -> Batch:
    """
    Return a batch without targets in the examples that accelerate repeated, so that none is trained or counted twice.

    The load-balancing loss of a mixture of experts is a mean over tokens with or without a target. So repeated tokens
    get a multiplicity of 0. A batch of nothing but repetitions, over which there is no mean, is marked `is_blank`.

    Takes the batch that the accelerator's data loader has just returned, and the batch size of the loader that was
    prepared. The accelerator knows `num_examples`, except from a loader that skips some when a run resumes.
    """
    state, (num_ranks, rank) = accelerator.gradient_state, data_ranks(accelerator)
    is_own_row = "tree" in batch and not batch["tree"].is_shared  # its rank saw to a shared one
    if num_ranks == 1 or not state.end_of_dataloader or not is_own_row:
        return batch
    if accelerator.split_batches:
        batch_size //= num_ranks
    remainder = state.remainder if num_examples is None else num_examples % (num_ranks * batch_size)
    if remainder <= 0:
        return batch
    tree: RowTree = batch["tree"]
    ends = (0, *tree.plan.example_ends)
    num_new = remainder - rank * batch_size
    end = ends[min(max(num_new, 0), len(ends) - 1)]
    labels, multiplicity = batch["labels"].clone(), batch["attention_mask"].clone()
    labels[:, end:] = IGNORE_INDEX
    multiplicity[:, end:] = 0
    weights = None if tree.loss_weights is None else tree.loss_weights * (labels != IGNORE_INDEX)
    tree = tree.replace(loss_weights=weights, is_blank=end == 0)
    return {**batch, "labels": labels, **({"attention_mask": multiplicity} if end else {}), "tree": tree}


def scale_router_loss(batches: Sequence[Batch], accelerator: Accelerator, is_trained: bool) -> None:
    """
    Let the load-balancing loss of a step be the mean over its batches that are not blank.

    It is the mean over all batches of all ranks; each batch gets a factor, its `router_loss_scale`. In a step of 2
    ranks with 2 batches each, of which one is blank, that one has a factor of 0, the others of 4/3.

    Every rank must call; its batches are changed in place. `is_trained` says whether the model has such a loss; if
    not, nothing happens.
    """
    if not is_trained:
        return
    num_own = sum(not batch["tree"].is_blank for batch in batches)
    everyone = accelerator.gather(torch.tensor([num_own], device=accelerator.device))
    scale = len(everyone) * len(batches) / max(int(everyone.sum()), 1)
    for batch in batches:
        tree = batch["tree"]
        batch["tree"] = tree.replace(router_loss_scale=0.0 if tree.is_blank else scale)


def without_empty_batches(
    values: tuple[int, ...], args: TrainingArguments, num_examples: int, num_ranks: int, group_size: int
) -> tuple[int, ...]:
    """
    Return the numbers of steps of a run without those that would only train repetitions.

    Ranks that share rows train each other's rows in turn. Where an epoch ends with fewer new rows than ranks that
    share them, the last turns only repeat rows: of 9 rows on 8 ranks in groups of 4, the last 3 of 8 turns.

    `values` are what [`~transformers.Trainer.set_initial_training_values`] returns: epochs, steps per epoch, …,
    batches per epoch and steps of the run. `num_examples` comes from [`num_repeatable_examples`]; `group_size` ranks
    share rows.
    """
    epochs, _, *others, batches, max_steps = values
    batch_size = args.per_device_train_batch_size
    num_new = math.ceil(num_examples % (num_ranks * batch_size) / batch_size)  # ranks with new examples
    batches -= max(group_size - num_new, 0) if num_new else 0
    steps = math.ceil(batches / args.gradient_accumulation_steps)
    if args.max_steps > 0:
        epochs = math.ceil(max_steps / steps)
    else:
        max_steps = math.ceil(args.num_train_epochs * steps)
    return epochs, steps, *others, batches, max_steps


# Streams -------------------------------------------------------------------------------------------------------------


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
        # The load-balancing loss of experts is a mean over them, even where it has no effect.
        multiplicity=tokens + 1,
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
