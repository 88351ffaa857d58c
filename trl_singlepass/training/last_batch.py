"""The last batch of an epoch: several processes need a batch each, so accelerate repeats examples of the start."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized

import torch
from accelerate import Accelerator
from transformers import TrainingArguments

from ..data.collator import Batch
from ..data.row_tree import RowTree
from ..trees.prefix_tree import IGNORE_INDEX


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


def data_ranks(accelerator: Accelerator) -> tuple[int, int]:
    """
    Return how many ranks receive batches of their own, and which of them this one is.

    Ranks that share the layers of a model (tensor parallelism) share batches: of 8 ranks with `tp_size=2`, 4 do, and
    rank 5 is number 2 of them.
    """
    size = getattr(accelerator.parallelism_config, "tp_size", None) or 1
    return accelerator.num_processes // size, accelerator.process_index // size


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
