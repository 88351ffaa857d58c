"""
The ends of epochs: each example is trained once, on any number of ranks, in complete steps.

Several ranks need a batch each, so accelerate completes the last batches of an epoch with examples of the start. Those
of stored datasets lose their targets here, and streams have a loader of their own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence, Sized
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
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..data.collator import Batch, DataCollatorForSinglePass
from ..data.row_tree import RowTree
from ..data.sampler import make_train_sampler
from ..engine.borrowed_state import attributes
from ..engine.ulysses import SequenceParallel
from ..trees.image_features import NO_FEATURE
from ..trees.prefix_tree import IGNORE_INDEX
from ..trees.rows import Row
from .dataset import AnyDataset
from .loss import NumItems


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


class EpochsMixin(Trainer):
    """What a trainer overrides so that an epoch trains each example once."""

    train_dataset: AnyDataset
    _trains_turns: bool
    _sequence_parallel: SequenceParallel | None = None
    _stream_steps: StreamSteps | None = None

    @property
    @abstractmethod
    def _collator(self) -> DataCollatorForSinglePass:
        """Makes batches of rows."""

    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    def _get_train_sampler(self, train_dataset: AnyDataset | None = None) -> Sampler[int] | None:
        """Give ranks rows of equal cost; the Trainer ignores cost, and every rank waits for the slowest."""
        sampler = make_train_sampler(
            self.train_dataset, self.args, self.accelerator, self.model.config, self._train_batch_size, self._epoch
        )
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Train each row of a stream once per epoch; accelerate completes the last batches with rows of its start."""
        stream, self._stream_steps = self.train_dataset, None
        if isinstance(stream, Sized) or not self._trains_turns:
            return super().get_train_dataloader()
        if self._sequence_parallel is not None:
            with attributes(self, train_dataset=stream.repeat(None)):  # a rank without a row would wait forever
                return super().get_train_dataloader()
        # A rank's own batches, prepared as accelerate does it for a single process: they end where the stream ends.
        self._stream_steps = StreamSteps(self.accelerator, blank_batch(self._collator))
        num_ranks, rank = data_ranks(self.accelerator)
        given = {name: f"dataloader_{name}" for name in _LOADER_SETTINGS}
        settings = {name: getattr(self.args, key) for name, key in given.items() if hasattr(self.args, key)}
        loader: DataLoader[Batch] = DataLoader(
            part_of_rank(stream, num_ranks, rank),
            batch_size=self._train_batch_size // (num_ranks if self.accelerator.split_batches else 1),
            collate_fn=self.data_collator,
            **settings,
        )
        options = {"num_processes": 1, "process_index": 0, "put_on_device": True, "dispatch_batches": False}
        return prepare_data_loader(loader, self.accelerator.device, **options)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader[Batch]) -> tuple[int, ...]:
        """Leave out steps in which ranks that share rows only repeat some; the Trainer does not know of them."""
        values = super().set_initial_training_values(args, dataloader)
        if self._sequence_parallel is None:
            return values
        # They train each other's rows in turn: of 9 rows on 8 ranks in groups of 4, the last 3 of 8 turns repeat some.
        epochs, _, *others, batches, max_steps = values
        batch_size = args.per_device_train_batch_size
        num_last = self._num_repeatable_examples() % (self.accelerator.num_processes * batch_size)
        num_new = math.ceil(num_last / batch_size)  # ranks with new examples
        batches -= max(self._sequence_parallel.size - num_new, 0) if num_new else 0
        steps = math.ceil(batches / args.gradient_accumulation_steps)
        if args.max_steps > 0:
            epochs = math.ceil(max_steps / steps)
        else:
            max_steps = math.ceil(args.num_train_epochs * steps)
        return epochs, steps, *others, batches, max_steps

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        """Resume a stream in its epoch, at its row; for the Trainer, it is one endless epoch."""
        position: tuple[int, int] = super()._init_training_state(*args)
        checkpoint = args[3]
        if self._stream_steps is None or checkpoint is None:
            return position
        if not (saved := Path(checkpoint, TRAINER_STATE_NAME)).is_file():
            return position
        # The saved `epoch` is the number of whole epochs, and a fraction that counts batches in units of all batches
        # of the run: with `max_steps=10` and 2 batches per step, 2.35 is 2 epochs and 0.35 · 20 = 7 batches.
        state = TrainerState.load_from_json(str(saved))
        epochs, fraction = divmod(state.epoch or 0, 1)
        batches = round(fraction * state.max_steps * self.args.gradient_accumulation_steps)
        return int(epochs), 0 if self.args.ignore_data_skip else batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], NumItems]:
        """Complete a stream's steps, and train no example twice; accelerate repeats some in an epoch's last batch."""
        if self._stream_steps is not None:
            epoch_iterator = self._stream_steps.complete(epoch_iterator, num_batches)
        return super().get_batch_samples(map(self._without_repeats, epoch_iterator), num_batches, device)

    def _without_repeats(self, batch: Batch) -> Batch:
        num_examples = self._num_repeatable_examples()
        return without_repeated_examples(batch, self.accelerator, self._train_batch_size, num_examples)

    def _num_repeatable_examples(self) -> int:
        """Return the number of examples of a training set that accelerate may complete with repetitions, else 0."""
        if self.args.dataloader_drop_last or self.args.train_sampling_strategy == "batch_rebalance":
            return 0
        return len(self.train_dataset) if isinstance(self.train_dataset, Sized) else 0


def data_ranks(accelerator: Accelerator) -> tuple[int, int]:
    """Return how many ranks receive batches of their own, and which this one is; those of a `tp_size` share theirs."""
    size = getattr(accelerator.parallelism_config, "tp_size", None) or 1
    return accelerator.num_processes // size, accelerator.process_index // size


# Stored datasets -----------------------------------------------------------------------------------------------------


def without_repeated_examples(
    batch: Batch, accelerator: Accelerator, batch_size: int, num_examples: int | None = None
) -> Batch:
    """
    Return a batch without targets in the examples that accelerate repeated, so that none is trained or counted twice.

    A load-balancing loss is a mean over tokens with or without a target, so repeated tokens get a multiplicity of 0. A
    batch of nothing but repetitions is marked `is_blank`. The accelerator knows `num_examples` unless a run resumes.
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
    Let the load-balancing loss of a step, if one is trained, be the mean over its batches that are not blank.

    It is the mean over all batches of all ranks, each with a factor, its `router_loss_scale`. In a step of 2 ranks
    with 2 batches each, of which one is blank, that one has a factor of 0, the others of 4/3. Every rank must call.
    """
    if not is_trained:
        return
    num_own = sum(not batch["tree"].is_blank for batch in batches)
    everyone = accelerator.gather(torch.tensor([num_own], device=accelerator.device))
    scale = len(everyone) * len(batches) / max(int(everyone.sum()), 1)
    for batch in batches:
        tree = batch["tree"]
        batch["tree"] = tree.replace(router_loss_scale=0.0 if tree.is_blank else scale)


# Streams -------------------------------------------------------------------------------------------------------------


def part_of_rank(stream: IterableDataset, num_ranks: int, rank: int) -> IterableDataset:
    """Return the rows that one of several ranks reads: whole shards if there are enough, else every n-th row."""
    if num_ranks == 1:
        return stream
    if stream.num_shards >= num_ranks:
        return stream.shard(num_shards=num_ranks, index=rank)
    return split_dataset_by_node(stream, rank=rank, world_size=num_ranks)


class StreamSteps:
    """Completes steps of a stream with `blank`, two tokens without a target, where a rank runs out of batches."""

    def __init__(self, accelerator: Accelerator, blank: Batch) -> None:
        self._accelerator, self._blank = accelerator, blank
        self._ended: Iterator[Batch] | None = None

    def complete(self, epoch: Iterator[Batch], num_batches: int) -> Iterator[Batch]:
        """Return the batches of the next step, or none at the end of the epoch, whose iterator stays the same."""
        if epoch is self._ended:  # the Trainer goes on asking, for as many steps as the run has
            return iter(())
        batches = list(islice(epoch, num_batches))
        counts = [len(batches)]
        if self._accelerator.num_processes > 1:
            counts = self._accelerator.gather(torch.tensor(counts, device=self._accelerator.device)).tolist()
        if not any(counts):
            self._ended = epoch
            return iter(())
        missing = range(num_batches - len(batches))
        return iter([*batches, *(send_to_device(dict(self._blank), self._accelerator.device) for _ in missing)])


def blank_batch(collator: DataCollatorForSinglePass) -> Batch:
    """Return a batch of one row without targets: it completes a step, and adds nothing to loss or gradients."""
    tokens = np.zeros(2, np.int64)
    row = Row(
        input_ids=tokens + collator.pad_token_id,
        subtree_end=tokens + 2,
        token_parts=tokens,
        token_weights=np.zeros(2),
        # The load-balancing loss of experts is a mean over them, even where it has no effect.
        multiplicity=tokens + 1,
        image_features=None if collator.blank_image is None else tokens + NO_FEATURE,
    )
    batch = collator([row.columns()])
    return {**batch, "tree": batch["tree"].replace(is_blank=True)}
