"""The tree of the row that a model call runs on, for the layers inside the call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..trees.rows import TreePlan
from .kv_cache import MemoryAccess


@dataclass(eq=False)
class Tree:
    """
    Tree of the row that a model call runs on.

    Args:
        plan (`TreePlan`):
            Structure in plain integers.
        subtree_end (`torch.Tensor` of shape `(1, row_length)`, `torch.int64`):
            For each token, the position just past its last descendant.
        depth (`torch.Tensor` of shape `(1, row_length)`, `torch.int64`):
            Number of tokens before each token on its path.
    """

    plan: TreePlan
    subtree_end: torch.Tensor
    depth: torch.Tensor
    attended_by: set[torch.nn.Module] = field(default_factory=set)

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

    def memory_of(self, layer: torch.nn.Module, local_size: int | None = None) -> MemoryAccess | None:
        """
        Return keys and values of ancestors that ran before this row; a whole tree has none.

        Args:
            layer (`torch.nn.Module`):
                Attention layer.
            local_size (`int`, *optional*):
                Upper bound of how many tokens back it looks, itself included.
        """
        return None


_current_tree: ContextVar[Tree | None] = ContextVar("trl_singlepass_tree", default=None)


@contextmanager
def tree_context(plan: TreePlan, subtree_end: torch.Tensor, position_ids: torch.Tensor) -> Iterator[Tree]:
    """
    Run the model calls inside on one row of trees; other calls stay ordinary.

    Args:
        plan (`TreePlan`):
            Structure of the row, as `DataCollatorForSinglePass` returns it.
        subtree_end (`torch.Tensor` of shape `(1, row_length)`, `torch.int64`):
            For each token, the position just past its last descendant.
        position_ids (`torch.Tensor` of shape `(1, row_length)`, `torch.int64`):
            Depth of each token.

    Yields:
        `Tree`: The tree; after a forward, `attended_by` holds the attention modules that received it.
    """
    with running_on(Tree(plan, subtree_end, position_ids)) as tree:
        yield tree


@contextmanager
def running_on(tree: Tree) -> Iterator[Tree]:
    """
    Run the model calls inside on a tree.

    Args:
        tree (`Tree`):
            Tree of the row.

    Yields:
        `Tree`: The same tree.
    """
    token = _current_tree.set(tree)
    try:
        yield tree
    finally:
        _current_tree.reset(token)


def current_tree() -> Tree | None:
    """Return the tree of the model call in progress, `None` for an ordinary batch."""
    return _current_tree.get()
