"""From rows to batch tensors: the conversations of a batch side by side in one padding-free row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..images.positions import PathPositions
from ..trees.image_features import NO_FEATURE, ImageReference
from ..trees.prefix_tree import IGNORE_INDEX
from ..trees.rows import ROW_COLUMNS, Row, Run, TreePlan


Batch = dict[str, Any]
"""Inputs of a model by name; those that [`DataCollatorForSinglePass`] returns, where there is a `tree_plan`."""
LoadImages = Callable[[Sequence[ImageReference]], dict[str, torch.Tensor]]
"""From images to what a model reads of them, each once, in their order."""
Collator = Callable[[list[Mapping[str, Any]]], Batch]


@dataclass
class DataCollatorForSinglePass:
    """
    Join the conversations of a batch into one padding-free row.

    All that a kernel needs to know about the structure of the trees leaves here as plain integers (`tree_plan`), so
    that a training step never waits for the device to learn it.

    Args:
        pad_token_id (`int`):
            Token that pads the row to a multiple of `pad_to_multiple_of`.
        pad_to_multiple_of (`int`, *optional*):
            If set, the length of the row is a multiple of this number of tokens.
        load_images (`Callable`, *optional*):
            Returns what the model reads of some images, such as `pixel_values`; needed for rows with images.
        positions ([`PathPositions`], *optional*):
            Positions of several dimensions, for a model that gives images such positions.
        blank_image (`Callable`, *optional*):
            Returns what the model reads of a blank image, for rows without images: several ranks must run the encoder
            of images together, or none.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    load_images: LoadImages | None = None
    positions: PathPositions | None = None
    blank_image: Callable[[], dict[str, torch.Tensor]] | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Collate rows.

        Args:
            examples (`Sequence[Mapping[str, Any]]`):
                Rows, as columns (see [`Row.columns`]).

        Returns:
            `dict[str, Any]`: `input_ids`, `position_ids`, `attention_mask` (the multiplicity of each token, 0 on
            padding), `labels` (rolled), `label_parts` and `subtree_end`, all `torch.int64` of shape `(1, row_length)`;
            `loss_weights`, `torch.float32` of that shape, only if a label has a weight other than 1; and `tree_plan`,
            a [`TreePlan`]. Rows with `IMAGE_COLUMNS` also have `image_features`, `torch.int64` of that shape, -1 for
            text, and, if one of them shows an image, `image_inputs`: what the model reads of the distinct images of
            the row, in the order of their features; for a model that has such, `rope_position_ids`, `torch.int64` of
            shape `(num_dimensions, 1, row_length)`.
        """
        rows = [Row.from_columns(example) for example in examples]
        if self.pad_to_multiple_of:
            rows += _padding_rows(-sum(map(len, rows)) % self.pad_to_multiple_of, self.pad_token_id)
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
        if row.image_features is not None:
            batch["image_features"] = _as_batch(row.image_features)
            if not row.images and self.blank_image is not None:
                batch["image_inputs"] = self.blank_image()
        if row.images:
            if self.load_images is None:
                raise ValueError(
                    "The rows have images, but the collator cannot load any. Leave data_collator unset, or give it "
                    "load_images."
                )
            batch["image_inputs"] = self.load_images(row.images)
            if self.positions is not None:
                batch["rope_position_ids"] = self.positions.in_row(
                    row.input_ids, row.all_image_features(), plan, batch["image_inputs"]
                )
        return batch


class TreeOrPlainCollator:
    """
    Collate trees with one collator and plain sequences with another: a trainer may train on one and evaluate on the
    other.

    Args:
        tree (`Callable`):
            Collator of rows that hold trees.
        plain (`Callable`):
            Collator of all other examples.
    """

    def __init__(self, tree: Collator, plain: Collator) -> None:
        self.tree, self.plain = tree, plain

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate examples, all of one kind."""
        collate = self.tree if set(ROW_COLUMNS) <= set(examples[0]) else self.plain
        return collate(list(examples))


def pad_batch(batch: dict[str, Any], length: int, pad_token_id: int) -> dict[str, Any]:
    """
    Return a batch whose row is padded with one more chain, which no other token attends to and nothing trains.

    Args:
        batch (`dict[str, Any]`):
            Batch of one row with `tree_plan`, without `subtree_end`.
        length (`int`):
            Length of the padded row, in tokens.
        pad_token_id (`int`):
            Token to pad with.

    Returns:
        `dict[str, Any]`: The batch.
    """
    plan = batch["tree_plan"]
    missing = length - plan.length
    if missing == 0:
        return batch
    fill = {"input_ids": pad_token_id, "labels": IGNORE_INDEX, "image_features": NO_FEATURE}
    padded = {
        name: F.pad(value, (0, missing), value=fill.get(name, 0)) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }
    padded["position_ids"][:, plan.length :] = torch.arange(missing)
    padding = Run(start=plan.length, end=length, depth=0, prefix=())
    padded["tree_plan"] = replace(plan, length=length, runs=(*plan.runs, padding))
    return padded


def _padding_rows(num_tokens: int, pad_token_id: int) -> list[Row]:
    """Return `num_tokens` of padding as one chain, so that it costs a kernel one run and not one per token."""
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


def _as_batch(array: NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.array(array))[None]
