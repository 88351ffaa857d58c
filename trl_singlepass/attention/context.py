"""
The tree of the row that a model call runs on, and how it reaches the layers of the model.

A layer has to find the tree twice: in the forward pass, and when gradient checkpointing runs the layer again during
backward, long after the forward's context has ended. Checkpointing repeats a layer with the arguments it had, so the
tree travels in those arguments. There are three carriers, each for a reader that gets nothing else:

| carrier | who reads it | why |
|---|---|---|
| [`current_tree`], a context variable around the model call | mask functions registered with transformers, and the pre-forward hook of the inner model (`recurrent/layer.py`) | both run once per forward, outside of checkpointed layers, and no argument reaches them |
| [`TreeMask`], passed as `attention_mask` | attention layers | transformers builds one mask per layer type and passes it to every layer of that type |
| `TreePaddingMask`, passed as the two-dimensional `attention_mask` | recurrent and convolutional layers | they get the padding mask, not the mask of attention |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..trees.rows import TreePlan
from .kv_cache import KVCacheView
from .row_group import RowGroup


T = TypeVar("T")


@dataclass(eq=False)
class Tree:
    """Tree of the row that a model call runs on."""

    plan: TreePlan
    subtree_end: torch.Tensor  # (1, row_length), int64: the position just past each token's last descendant
    depth: torch.Tensor  # (1, row_length), int64: the number of tokens before each token on its path
    group: RowGroup | None = None  # ranks that share the row; each runs the model on its part of the tokens
    sample_ends: NDArray[np.int64] | None = None  # positions at which samples end
    seen: set[torch.nn.Module] = field(default_factory=set, init=False, repr=False)  # layers that ran on it
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

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
        return self if device == self.depth.device else self.make_once(device, lambda: self._copy_to(device))

    def _copy_to(self, device: torch.device) -> Tree:
        end, depth = (x.to(device, non_blocking=True) for x in (self.subtree_end, self.depth))
        return replace(self, subtree_end=end, depth=depth)

    def make_once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return `make()`, made once per row and shared by all layers that ask for the same key."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def sample_lengths(self, limits: Iterable[int]) -> torch.Tensor:
        """
        Return for each token the number of tokens of the longest sample of its tree, `(1, row_length)`.

        Raises `ValueError` if a tree has samples both up to one of some `limits` and above it.
        """
        starts = np.array([run.start for run in self.plan.runs if not run.prefix])
        depths = self.plan.depths()
        longest = np.maximum.reduceat(depths, starts) + 1
        ends = np.empty(0, np.int64) if self.sample_ends is None else self.sample_ends
        lengths, longest_beside = depths[ends] + 1, longest[np.searchsorted(starts, ends, side="right") - 1]
        for limit in limits:
            if ((lengths <= limit) & (longest_beside > limit)).any():
                raise ValueError(
                    f"The RoPE of this model (longrope) has other factors for samples of more than {limit} tokens, "
                    "and a tree has samples of both kinds, though each token that they share can have but one of "
                    f"these. Set max_length={limit}, or a DataCollatorForSinglePass with rope_lengths=({limit},)."
                )
        return torch.from_numpy(np.repeat(longest, np.diff([*starts, self.plan.length])))[None]

    def part_of_rank(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of what each token of the row has, `(1, row_length)`."""
        return x if self.group is None else self.group.part(x)

    def kv_cache(self, layer: torch.nn.Module, local_size: int | None = None) -> KVCacheView | None:
        """
        Return keys and values of ancestors that ran before this row, `local_size` tokens back; a whole tree has none.
        """
        return None


_current_tree: ContextVar[Tree | None] = ContextVar("trl_singlepass_tree", default=None)


@contextmanager
def running_on(tree: Tree) -> Iterator[Tree]:
    """Run the model calls inside on a tree, and yield it. Calls outside are not affected."""
    token = _current_tree.set(tree)
    try:
        yield tree
    finally:
        _current_tree.reset(token)


def current_tree() -> Tree | None:
    """Return the tree of the model call in progress, `None` for an ordinary batch."""
    return _current_tree.get()
