"""What each layer receives as its attention mask: the tree of the row together with the model's own rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
from transformers.masking_utils import causal_mask_function

from .context import Tree, current_tree


T = TypeVar("T")


class TreeMask:
    """
    Attention rule of one mask type of the model, on a tree.

    transformers builds one mask per type (full, sliding, chunked) and hands it to each layer of that type as
    `attention_mask`. This object goes the same way, so no argument has to survive the layers, and the recomputation of
    gradient checkpointing sees what the forward saw.

    A query attends to a key exactly when the key is the query itself or one of its ancestors, and the model's own
    `mask_function` allows it **at their depths**: sliding windows and chunks count depth, not index.

    It is no dataclass: FSDP looks for tensors in those, and would hand each layer a copy in another precision.

    Args:
        tree (`Tree`):
            Tree of the row.
        mask_function (`Callable`):
            The model's own rule, as transformers defines it: `mask_function(batch, head, query, key)`.
        local_size (`int`, *optional*):
            Upper bound of how many tokens back the rule looks (window or chunk), in tokens.
    """

    def __init__(self, tree: Tree, mask_function: Callable[..., torch.Tensor], local_size: int | None = None) -> None:
        self.tree, self.mask_function, self.local_size = tree, mask_function, local_size
        self._derived: dict[Any, Any] = {}

    def derived(self, build: Callable[..., T], *arguments: Any) -> T:
        """
        Return `build(self, *arguments)`, built once and shared by all layers of this mask type.

        Args:
            build (`Callable`):
                Function of this mask and of `arguments`.
            *arguments (`Any`):
                Hashable arguments.

        Returns:
            `T`: What `build` returned.
        """
        key = (build, *arguments)
        if key not in self._derived:
            self._derived[key] = build(self, *arguments)
        result: T = self._derived[key]
        return result

    @cached_property
    def is_causal(self) -> bool:
        """Whether every ancestor is visible, so that no mask has to be evaluated."""
        if self.mask_function is causal_mask_function:
            return True
        return self.local_size is not None and self.tree.max_depth < self.local_size and self._is_local_only

    @cached_property
    def _is_local_only(self) -> bool:
        """Whether the rule is transformers' own causal window or chunk and nothing else."""
        closure = getattr(self.mask_function, "__closure__", None) or ()
        parts = next((cell.cell_contents for cell in closure if isinstance(cell.cell_contents, tuple)), ())
        names = sorted(getattr(part, "__qualname__", "") for part in parts)
        local = {"sliding_window_overlay.<locals>.inner_mask", "chunked_overlay.<locals>.inner_mask"}
        return len(names) == 2 and "causal_mask_function" in names and bool(local & set(names))

    def between(self, query_depth: torch.Tensor, key_depth: torch.Tensor) -> torch.Tensor:
        """
        Evaluate the rule between tokens of one path.

        Args:
            query_depth (`torch.Tensor` of shape `(num_queries,)`, `torch.int64`):
                Depths of the queries.
            key_depth (`torch.Tensor` of shape `(num_keys,)`, `torch.int64`):
                Depths of the keys, all on the path of each query or below it.

        Returns:
            `torch.Tensor` of shape `(num_queries, num_keys)`, `torch.bool`: `True` where the query attends.
        """
        query, key = query_depth[:, None], key_depth[None, :]
        zero = torch.zeros((), dtype=torch.long, device=query_depth.device)
        return self.mask_function(zero, zero, query, key) & (key <= query)

    def dense(self) -> torch.Tensor:
        """Return the whole mask, shape `(1, 1, row_length, row_length)`, `torch.bool`: the reference, O(tokens²)."""
        depth, end = self.tree.depth[0], self.tree.subtree_end[0]
        position = torch.arange(len(depth), device=depth.device)
        is_ancestor = (position[None, :] <= position[:, None]) & (position[:, None] < end[None, :])
        return (self.between(depth, depth) & is_ancestor)[None, None]


def tree_mask_or(plain_mask: Callable[..., Any]) -> Callable[..., Any]:
    """
    Return the mask function to register in transformers: a `TreeMask` on a tree, the stock mask on other batches.

    Args:
        plain_mask (`Callable`):
            Stock mask function of `transformers.masking_utils` for batches without a tree (generation, plain rows).
    """

    def build_mask(**kwargs: Any) -> Any:
        tree = current_tree()
        if tree is None:
            return plain_mask(**kwargs)
        return TreeMask(tree, kwargs["mask_function"], kwargs.get("local_size"))

    return build_mask
