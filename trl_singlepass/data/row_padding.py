"""Padding of rows that are batches already."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from ..trees.prefix_tree import IGNORE_INDEX
from ..trees.rows import Run


def padded_to(length: int, batch: dict[str, Any], pad_token_id: int) -> dict[str, Any]:
    """
    Return a batch whose row is filled up with one more chain, which no token attends to and nothing trains.

    Args:
        length (`int`):
            Length of the row, in tokens.
        batch (`dict[str, Any]`):
            Batch of one row with `tree_plan`, without `subtree_end`.
        pad_token_id (`int`):
            Token that fills the row up.

    Returns:
        `dict[str, Any]`: The batch.
    """
    plan = batch["tree_plan"]
    missing = length - plan.length
    if missing == 0:
        return batch
    fill = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
    padded = {
        name: F.pad(value, (0, missing), value=fill.get(name, 0)) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }
    padded["position_ids"][:, plan.length :] = torch.arange(missing)
    padding = Run(start=plan.length, end=length, depth=0, prefix=())
    padded["tree_plan"] = replace(plan, length=length, runs=(*plan.runs, padding))
    return padded
