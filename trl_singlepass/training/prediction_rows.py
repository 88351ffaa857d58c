"""What `compute_metrics` gets: one row per example of a batch, though a batch is one row to the model."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..trees.prefix_tree import IGNORE_INDEX


def per_example(tensor: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """
    Return a row of several examples as one row each, as stock training hands them on.

    Args:
        tensor (`torch.Tensor` of shape `(1, row_length, …)`):
            Logits or rolled labels of a batch.
        batch (`dict[str, Any]`):
            Batch of the collator.

    Returns:
        `torch.Tensor` of shape `(num_examples, longest, …)`: The same by example, filled up with -100 as the Trainer
        does it. Along each row, the target beside `[:, i + 1]` is that of the prediction at `[:, i]`.
    """
    ends = batch["tree_plan"].example_ends
    starts = (0, *ends[:-1])
    counts = batch["attention_mask"][0]
    parts = [tensor[0, start:end] for start, end in zip(starts, ends, strict=True) if counts[start] > 0]  # no padding
    return pad_sequence(parts, batch_first=True, padding_value=IGNORE_INDEX)
