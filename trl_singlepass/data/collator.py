"""From rows to batch tensors: the conversations of a batch side by side in one padding-free row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..images.reading import ImageReader
from ..trees.image_features import ImageReference
from ..trees.prefix_tree import IGNORE_INDEX
from ..trees.rows import ROW_COLUMNS, Row, Run, TreePlan, count_ending
from .row_tree import RowTree


Batch = dict[str, Any]
"""Inputs of a model by name; those that [`DataCollatorForSinglePass`] returns, where there is a `tree`."""
LoadImages = Callable[[Sequence[ImageReference]], dict[str, torch.Tensor]]
"""From images to what a model reads of them, each once, in their order."""
Collator = Callable[[list[Mapping[str, Any]]], Batch]


@dataclass
class DataCollatorForSinglePass:
    """
    Join the conversations of a batch into one padding-free row.

    All that is not an input of a Hugging Face model is in one entry, `tree`, which a model takes on which
    [`enable_tree`] was called. All that a kernel needs to know about the structure of the trees leaves here as plain
    integers (`tree.plan`), so that a training step never waits for the device to learn it.

    Args:
        pad_token_id (`int`):
            Token that pads the row to a multiple of `pad_to_multiple_of`.
        pad_to_multiple_of (`int`, *optional*):
            If set, the length of the row is a multiple of this number of tokens.
        load_images (`Callable`, *optional*):
            Returns what the model reads of some images, such as `pixel_values`; needed for rows with images.
        image_reader ([`ImageReader`], *optional*):
            What the model reads of such rows besides; from [`enable_images`].
        blank_image (`Callable`, *optional*):
            Returns what the model reads of a blank image, for rows without images: several ranks must run the encoder
            of images together, or none.
        rope_lengths (`tuple[int, ...]`, *optional*):
            Numbers of tokens above which a sample has another RoPE (longrope), so that longer samples share no tokens
            with shorter ones; the trainers set it.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    load_images: LoadImages | None = None
    image_reader: ImageReader | None = None
    blank_image: Callable[[], dict[str, torch.Tensor]] | None = None
    rope_lengths: tuple[int, ...] = ()

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Collate rows.

        Args:
            examples (`Sequence[Mapping[str, Any]]`):
                Rows, as columns (see [`Row.columns`]).

        Returns:
            `dict[str, Any]`: `input_ids`, `position_ids`, `attention_mask` (the multiplicity of each token, 0 on
            padding) and `labels` (rolled), all `torch.int64` of shape `(1, row_length)`, and `tree`, a [`RowTree`].
            Rows with `IMAGE_COLUMNS` also have what the model reads of the distinct images of the row, in the order of
            their features (`pixel_values`, …), and of its tokens (`mm_token_type_ids`, …); for a model that gives
            images such positions, `position_ids` have the shape `(num_dimensions, 1, row_length)`.
        """
        rows = [Row.from_columns(example) for example in examples]
        for limit in self.rope_lengths:
            rows = [row.apart(limit) for row in rows]
        if self.pad_to_multiple_of:
            rows += _padding_rows(-sum(map(len, rows)) % self.pad_to_multiple_of, self.pad_token_id)
        row = Row.join(rows)
        plan = TreePlan.from_rows(rows, row)
        depth, targets = _as_batch(plan.depths()), row.targets(plan)
        has_weights = (targets.loss_weights[targets.labels != IGNORE_INDEX] != 1).any()
        tree = RowTree(
            plan,
            _as_batch(row.subtree_end),
            depth,
            _as_batch(targets.label_parts),
            _as_batch(targets.loss_weights).float() if has_weights else None,
            None if row.image_features is None else _as_batch(row.image_features),
            row.images,
            sample_ends=np.flatnonzero(count_ending(row.multiplicity, plan.runs) > 0),
        )
        batch: dict[str, Any] = {
            "input_ids": _as_batch(row.input_ids),
            "position_ids": depth,
            "attention_mask": _as_batch(row.multiplicity),
            "labels": _as_batch(targets.labels),
            "tree": tree,
        }
        return batch if row.image_features is None else batch | self._image_inputs(row, plan)

    def reading_images_as(self, other: DataCollatorForSinglePass) -> DataCollatorForSinglePass:
        """Return this collator, with what it lacks to read images taken from another one."""
        for name in ("load_images", "image_reader", "blank_image"):
            setattr(self, name, getattr(self, name) or getattr(other, name))
        return self

    def _image_inputs(self, row: Row, plan: TreePlan) -> dict[str, torch.Tensor]:
        """Return what a model reads of a row of a dataset with images."""
        images: dict[str, torch.Tensor] = {}
        if row.images and (self.load_images is None or self.image_reader is None):
            raise ValueError(
                "The rows have images, and the model was not made to read any. A trainer does so if train_dataset "
                "or eval_dataset has images when it is made. In a loop of your own, call enable_images(model, "
                "collator, processor)."
            )
        if row.images:
            assert self.load_images is not None
            images = self.load_images(row.images)
        elif self.blank_image is not None:
            images = self.blank_image()
        if self.image_reader is None:
            return images
        return images | self.image_reader.row_inputs(row.input_ids, row.all_image_features(), plan, images)


class TreeOrPlainCollator:
    """
    Collate trees with one collator and plain sequences with another: a trainer may train on one and evaluate on the
    other.
    """

    def __init__(self, tree: DataCollatorForSinglePass, plain: Collator) -> None:
        self.tree, self.plain = tree, plain

    def exchanged(self, collator: Collator, trains_trees: bool) -> TreeOrPlainCollator:
        """
        Return both collators with another one in the place of that of the training set.

        A new collator of trees reads images as the one before did. One that would lose the trees of the training set
        is a `ValueError`.
        """
        if isinstance(collator, TreeOrPlainCollator):
            return collator
        if not trains_trees:
            return TreeOrPlainCollator(self.tree, collator)
        check_collator(collator)
        assert isinstance(collator, DataCollatorForSinglePass)
        return TreeOrPlainCollator(collator.reading_images_as(self.tree), self.plain)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate examples, all of one kind."""
        collate = self.tree if set(ROW_COLUMNS) <= set(examples[0]) else self.plain
        return collate(list(examples))


def check_collator(collator: object, expected: type = DataCollatorForSinglePass) -> None:
    """Refuse a collator that would lose the trees of rows."""
    if not isinstance(collator, expected):
        raise ValueError(
            f"data_collator={type(collator).__name__} would drop the trees of the rows, and branches would be trained "
            f"as one text. Leave data_collator unset, or pass a subclass of {expected.__name__}."
        )


def pad_batch(batch: dict[str, Any], length: int, pad_token_id: int) -> dict[str, Any]:
    """
    Return a batch whose row is padded with one more chain, which no other token attends to and nothing trains.

    The batch has one row of text; `length` is that of the padded row, in tokens.
    """
    tree: RowTree = batch["tree"]
    plan = tree.plan
    missing = length - plan.length
    if missing == 0:
        return batch

    def padded(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in ("position_ids", "depth"):
            return torch.cat([tensor, torch.arange(missing, device=tensor.device)[None]], dim=1)
        fill = {"input_ids": pad_token_id, "labels": IGNORE_INDEX, "subtree_end": length}
        return F.pad(tensor, (0, missing), value=fill.get(name, 0))

    padding = Run(start=plan.length, end=length, depth=0, prefix=())
    of_tree = {name: padded(name, value) for name, value in vars(tree).items() if isinstance(value, torch.Tensor)}
    longer = replace(plan, length=length, runs=(*plan.runs, padding))
    inputs = {name: padded(name, value) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return {**batch, **inputs, "tree": tree.replace(plan=longer, **of_tree)}


def _padding_rows(num_tokens: int, pad_token_id: int) -> list[Row]:
    """Return `num_tokens` of padding as one chain, so that it costs a kernel one run and not one per token."""
    if num_tokens == 0:
        return []
    return [
        Row(
            input_ids=np.full(num_tokens, pad_token_id),
            subtree_end=np.full(num_tokens, num_tokens),
            token_parts=np.zeros(num_tokens, np.int64),
            token_weights=np.zeros(num_tokens),
            multiplicity=np.zeros(num_tokens, np.int64),
        )
    ]


def _as_batch(array: NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.array(array))[None]
