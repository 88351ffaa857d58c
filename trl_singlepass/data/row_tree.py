"""What a batch says of the tree of its row, beside the inputs of a Hugging Face model: its entry `tree`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from ..trees.image_features import ImageReference
from ..trees.rows import TreePlan


class RowTree:
    """
    Tree of a row, on its way to the model.

    A model on which [`enable_tree`] was called takes it as an argument: `model(**batch)` runs the row as a tree.

    Not a dataclass, and nothing that PyTorch or an engine looks into: FSDP would cast the tensors in it to another
    precision, and DeepSpeed would round the weights.

    Args:
        plan (`TreePlan`):
            Structure in plain integers.
        subtree_end (`torch.Tensor` of shape `(1, row_length)`, `torch.int64`):
            For each token, the position just past its last descendant, counted in tokens from the start of the row.
        depth (`torch.Tensor` of shape `(1, row_length)`, `torch.int64`):
            Number of tokens before each token on its path.
        label_parts (`torch.Tensor` of shape `(1, row_length)`, `torch.int64`):
            For each rolled label, what it is part of ([`Sample.token_parts`]).
        loss_weights (`torch.Tensor` of shape `(1, row_length)`, `torch.float32`, *optional*):
            Weight of each rolled label, where one of them is not 1.
        image_features (`torch.Tensor` of shape `(1, row_length)`, `torch.int64`, *optional*):
            Feature that each token shows, -1 for text; in a dataset with images.
        images (`tuple[ImageReference, ...]`, *optional*):
            The distinct images of the row, in the order of their features.
    """

    def __init__(
        self,
        plan: TreePlan,
        subtree_end: torch.Tensor,
        depth: torch.Tensor,
        label_parts: torch.Tensor,
        loss_weights: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        images: tuple[ImageReference, ...] = (),
    ) -> None:
        self.plan, self.subtree_end, self.depth = plan, subtree_end, depth
        self.label_parts, self.loss_weights, self.image_features = label_parts, loss_weights, image_features
        self.images = images
        self.is_blank = False  # whether it holds nothing new, and only completes a step
        self.is_shared = False  # whether the ranks of a group share the row (sequence parallelism)
        self.is_handled = False  # see `handled`
        self.router_loss_scale = 1.0  # factor of the load-balancing loss of the batch

    def replace(self, **changes: Any) -> RowTree:
        """Return a copy with other values of some attributes."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def handled(self) -> RowTree:
        """
        Return the tree for a caller who sees to all that it asks for, and whose call of the model is not refused.

        Such a caller multiplies the loss of each target by its weight and the load-balancing loss by its factor, and
        runs the row as the trainer's settings say.
        """
        return self.replace(is_handled=True)

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> RowTree:
        """Return a copy with a function applied to each tensor."""
        return self.replace(
            **{name: function(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> RowTree:
        """Return the tree on a device; the same object if it is there."""
        if torch.device(device) == self.depth.device:
            return self
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> RowTree:
        """Return the tree in page-locked memory, from which a data loader copies to a GPU while it works."""
        return self.map_tensors(torch.Tensor.pin_memory)
