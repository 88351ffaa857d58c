"""
What a batch says of its trees, beside the inputs of a Hugging Face model: its entry `tree`.

It is one [`RowTree`], or, in batches of preference pairs, a [`LineView`].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ..trees.image_features import ImageReference
from ..trees.rows import TreePlan


MapTensor = Callable[[torch.Tensor], torch.Tensor]


class Receipt:
    """Whether a model has run on an entry `tree`; its copies share it."""

    is_given = False


class _Entry:
    """
    An entry `tree` on its way to the model.

    Not a dataclass, and nothing that PyTorch or an engine looks into: FSDP would cast the tensors in it to another
    precision, and DeepSpeed would round the weights.
    """

    is_handled = False  # see `handled`

    def __init__(self) -> None:
        self.receipt = Receipt()

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values of some attributes."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def handled(self) -> Self:
        """
        Return the entry for a caller who sees to all that it asks for, and whose call of the model is not refused.

        Such a caller multiplies the loss of each target by its weight and the load-balancing loss by its factor, and
        runs the rows as the trainer's settings say.
        """
        return self.replace(is_handled=True)

    def map_tensors(self, function: MapTensor) -> Self:
        """Return a copy with a function applied to each tensor."""
        return self.replace(**{name: _map_tensors(value, function) for name, value in vars(self).items()})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Return the entry on a device; the same object if it is there."""
        first = next(value for value in vars(self).values() if isinstance(value, torch.Tensor))
        if torch.device(device) == first.device:
            return self
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return the entry in page-locked memory, from which a data loader copies to a GPU while it works."""
        return self.map_tensors(torch.Tensor.pin_memory)


def _map_tensors(value: Any, function: MapTensor) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, _Entry):
        return value.map_tensors(function)
    if isinstance(value, dict):
        return {name: _map_tensors(item, function) for name, item in value.items()}
    return [_map_tensors(item, function) for item in value] if isinstance(value, list) else value


class RowTree(_Entry):
    """
    Tree of a row, on its way to the model.

    A model on which [`enable_tree`] was called takes it as an argument: `model(**batch)` runs the row as a tree.

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
        sample_ends (`np.ndarray` of shape `(num_ends,)`, `np.int64`, *optional*):
            Positions at which samples end.
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
        *,
        sample_ends: NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.subtree_end, self.depth = plan, subtree_end, depth
        self.label_parts, self.loss_weights, self.image_features = label_parts, loss_weights, image_features
        self.images, self.sample_ends = images, sample_ends
        self.is_blank = False  # whether it holds nothing new, and only completes a step
        self.is_shared = False  # whether the ranks of a group share the row (sequence parallelism)
        self.router_loss_scale = 1.0  # factor of the load-balancing loss of the batch


class LineView(_Entry):
    """
    Rows of a batch, and where in them each token of each line is predicted.

    TRL's losses of trajectories read one padded line for each. The model runs on the rows, in which lines share what
    they have in common, and its outputs are laid out as TRL expects them.

    Shape letters: N lines, M tokens of the longest line.

    `rows` are batches of [`DataCollatorForSinglePass`], one per row. `targets`, `(N, M)`, int64, is the position among
    the tokens of all rows that predicts each token, 0 where there is none; `token_weights`, `(N, M)`, float32, is the
    factor of each log-probability.
    """

    def __init__(
        self, rows: Sequence[dict[str, Any]], targets: torch.Tensor, token_weights: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.rows, self.targets, self.token_weights = list(rows), targets, token_weights
