"""Rows to batch tensors: the conversations of a batch side by side in one row without padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..trees.prefix_tree import IGNORE_INDEX
from ..trees.rows import ROW_COLUMNS, Row, TreePlan


@dataclass
class DataCollatorForSinglePass:
    """
    Join the conversations of a batch in one padding-free row.

    Everything that a kernel needs to know of the tree's structure leaves here as plain integers (`tree_plan`), so that
    a training step copies nothing from the device to find it out.

    Args:
        pad_token_id (`int`):
            Token that fills the row up to a multiple of `pad_to_multiple_of`.
        pad_to_multiple_of (`int`, *optional*):
            If set, the row length is rounded up to a multiple of this value, in tokens.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Collate rows.

        Args:
            examples (`Sequence[Mapping[str, Any]]`):
                Rows, as columns (see [`Row.columns`]).

        Returns:
            `dict[str, Any]`: `input_ids`, `position_ids`, `attention_mask` (the multiplicity of each token, 0 on
            padding), `labels` (rolled), `label_parts` and `subtree_end`, all `torch.int64` of shape `(1, row_length)`;
            `loss_weights`, `torch.float32` of that shape, only where some label weighs other than 1; and `tree_plan`,
            a [`TreePlan`].
        """
        rows = [Row.from_columns(example) for example in examples]
        if self.pad_to_multiple_of:
            rows += _padding(-sum(map(len, rows)) % self.pad_to_multiple_of, self.pad_token_id)
        row, plan = Row.join(rows), TreePlan.from_rows(rows)
        batch: dict[str, Any] = {
            "input_ids": _as_batch(row.input_ids),
            "position_ids": _as_batch(plan.depths()),
            "attention_mask": _as_batch(row.multiplicity),
            "labels": _as_batch(row.labels),
            "label_parts": _as_batch(row.label_parts),
            "subtree_end": _as_batch(row.subtree_end),
            "tree_plan": plan,
        }
        if (row.loss_weights[row.labels != IGNORE_INDEX] != 1).any():
            batch["loss_weights"] = _as_batch(row.loss_weights).float()
        return batch


class TreeOrPlainCollator:
    """
    Conversations to one collator, plain rows to another: a trainer may train on one and evaluate on the other.

    Args:
        tree (`Callable`):
            Collator of rows that hold trees.
        plain (`Callable`):
            Collator of all other rows.
    """

    def __init__(self, tree: Callable[..., Any], plain: Callable[..., Any]) -> None:
        self.tree, self.plain = tree, plain

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows, all of one kind."""
        collate = self.tree if set(ROW_COLUMNS) <= set(examples[0]) else self.plain
        batch: dict[str, Any] = collate(list(examples))
        return batch


def _padding(num_tokens: int, pad_token_id: int) -> list[Row]:
    """Rows that fill up `num_tokens`: one more chain, so that padding costs a kernel one run and not one per token."""
    if num_tokens == 0:
        return []
    return [
        Row(
            input_ids=np.full(num_tokens, pad_token_id),
            subtree_end=np.full(num_tokens, num_tokens),
            labels=np.full(num_tokens, IGNORE_INDEX),
            loss_weights=np.zeros(num_tokens),
            label_parts=np.zeros(num_tokens, np.int64),
            multiplicity=np.zeros(num_tokens, np.int64),
        )
    ]


def _as_batch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))[None]
