"""Evaluation loss: the mean over all trained tokens of a set, whatever the batch size and the number of processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from ..trees.prefix_tree import IGNORE_INDEX


class PooledLoss:
    """
    Running mean of a loss over batches of unequal weight; nothing is read from the device before the end.

    Args:
        device (`torch.device`):
            Device of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(2, dtype=dtype, device=device)

    def add(self, loss: torch.Tensor, weight: torch.Tensor) -> None:
        """
        Add a batch.

        Args:
            loss (`torch.Tensor`):
                Mean loss of the batch, a scalar.
            weight (`torch.Tensor`):
                Sum of its loss weights, a scalar.
        """
        weight = weight.to(self._sums)
        self._sums += torch.stack([loss.detach().to(weight) * weight, weight])

    def mean(self, accelerator: Accelerator) -> float | None:
        """
        Return the mean over all batches of all processes.

        Args:
            accelerator (`accelerate.Accelerator`):
                Accelerator of the run; every process has to call this.

        Returns:
            `float` or `None`: The mean; `None` if nothing was added.
        """
        loss, weight = accelerator.reduce(self._sums, reduction="sum").tolist()
        return loss / weight if weight > 0 else None


def without_repeated_examples(
    batch: dict[str, Any], accelerator: Accelerator, batch_size: int, num_examples: int | None = None
) -> dict[str, Any]:
    """
    Return a batch without targets in the examples that only fill up the last batches of several processes.

    Args:
        batch (`dict[str, Any]`):
            Batch that the accelerator's data loader has just given.
        accelerator (`accelerate.Accelerator`):
            Accelerator of the run; it repeats examples from the start of the set so that all processes have a batch.
        batch_size (`int`):
            Number of examples per batch of the data loader that was prepared.
        num_examples (`int`, *optional*):
            Number of examples in the set. The accelerator knows it unless its loader skips some after a resumption.

    Returns:
        `dict[str, Any]`: The batch.
    """
    state, (num_ranks, rank) = accelerator.gradient_state, data_ranks(accelerator)
    if num_ranks == 1 or not state.end_of_dataloader or "tree_plan" not in batch:
        return batch
    if accelerator.split_batches:
        batch_size //= num_ranks
    remainder = state.remainder if num_examples is None else num_examples % (num_ranks * batch_size)
    if remainder <= 0:
        return batch
    ends = (0, *batch["tree_plan"].example_ends)
    num_new = remainder - rank * batch_size
    labels = batch["labels"].clone()
    labels[:, ends[min(max(num_new, 0), len(ends) - 1)] :] = IGNORE_INDEX
    masked = {**batch, "labels": labels}
    if "loss_weights" in batch:
        masked["loss_weights"] = batch["loss_weights"] * (labels != IGNORE_INDEX)
    return masked


def data_ranks(accelerator: Accelerator) -> tuple[int, int]:
    """
    Return how many ranks get batches of their own, and which of them this one is.

    Args:
        accelerator (`accelerate.Accelerator`):
            Accelerator of the run. Ranks that share the layers of a model (tensor parallelism) share batches.

    Returns:
        `tuple[int, int]`: Number of ranks, and a rank.
    """
    size = getattr(accelerator.parallelism_config, "tp_size", None) or 1
    return accelerator.num_processes // size, accelerator.process_index // size
