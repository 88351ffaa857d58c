"""
The tree of the row that a model call runs on, and how it reaches the layers of the model.

A layer has to find the tree twice: in the forward pass, and when gradient checkpointing runs the layer again during
backward, long after the forward's context has ended. Checkpointing repeats a layer with the arguments it had, so the
tree travels in those arguments. There are three carriers, each for a reader that gets nothing else:

| carrier | who reads it | why |
|---|---|---|
| [`current_tree`], a context variable around the model call | mask functions registered with transformers, and the pre-forward hook of the inner model (`recurrent/tree_carrier.py`) | both run once per forward, outside of checkpointed layers, and no argument reaches them |
| [`TreeMask`], passed as `attention_mask` | attention layers | transformers builds one mask per layer type and passes it to every layer of that type |
| `TreePaddingMask`, passed as the two-dimensional `attention_mask` | recurrent and convolutional layers | they get the padding mask, not the mask of attention |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from ..trees.rows import TreePlan
from .kv_cache import KVCacheView
from .row_group import RowGroup


@dataclass(eq=False)
class Tree:
    """Tree of the row that a model call runs on."""

    plan: TreePlan
    subtree_end: torch.Tensor  # (1, row_length), int64: the position just past each token's last descendant
    depth: torch.Tensor  # (1, row_length), int64: the number of tokens before each token on its path
    group: RowGroup | None = None  # ranks that share the row; each runs the model on its part of the tokens
    _copies: dict[torch.device, Tree] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        expected = (1, self.plan.length)
        for name in ("subtree_end", "depth"):
            shape = tuple(getattr(self, name).shape)
            if shape != expected:
                raise ValueError(
                    f"A tree of {self.plan.length} tokens needs {name} of shape {expected}, got {shape}. Pass one row "
                    "per forward; several conversations share a row through `DataCollatorForSinglePass`."
                )

    @cached_property
    def max_depth(self) -> int:
        """Largest depth of a token."""
        return max(run.depth + run.end - run.start for run in self.plan.runs) - 1

    @cached_property
    def image_plan(self) -> TreePlan:
        """The plan whose images are runs of their own."""
        return self.plan.with_image_runs()

    def on(self, device: torch.device) -> Tree:
        """
        Return this tree on the device of a layer, copied there once per row.

        Where one process spreads a model over several GPUs (`device_map="auto"`), the tree starts on the first.
        """
        if device == self.depth.device:
            return self
        if device not in self._copies:
            end, depth = (x.to(device, non_blocking=True) for x in (self.subtree_end, self.depth))
            self._copies[device] = replace(self, subtree_end=end, depth=depth)
        return self._copies[device]

    def kv_cache(self, layer: torch.nn.Module, local_size: int | None = None) -> KVCacheView | None:
        """
        Return the keys and values of ancestors that ran before this row; a whole tree has none.

        The layer looks at most `local_size` tokens back, itself included.
        """
        return None


_current_tree: ContextVar[Tree | None] = ContextVar("trl_singlepass_tree", default=None)


@contextmanager
def tree_context(plan: TreePlan, subtree_end: torch.Tensor, position_ids: torch.Tensor) -> Iterator[Tree]:
    """
    Run the model calls inside on one row of trees, and yield its tree. Calls outside are not affected.

    Takes what `DataCollatorForSinglePass` returns. `subtree_end` is the position just past each token's last
    descendant, `position_ids` the depth of each token; both have shape `(1, row_length)`, int64.
    """
    with running_on(Tree(plan, subtree_end, position_ids)) as tree:
        yield tree


@contextmanager
def running_on(tree: Tree) -> Iterator[Tree]:
    """Run the model calls inside on a tree, and yield it."""
    token = _current_tree.set(tree)
    try:
        yield tree
    finally:
        _current_tree.reset(token)


def current_tree() -> Tree | None:
    """Return the tree of the model call in progress, `None` for an ordinary batch."""
    return _current_tree.get()
