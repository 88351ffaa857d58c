"""The attention mask that each layer receives: the tree of the row together with the model's own rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch

from .context import Tree, current_tree
from .mask_rules import MaskFunction, MaskRule, RuleKind


T = TypeVar("T")


class TreeMask:
    """
    Attention mask of one mask type of the model, on a tree.

    transformers builds one mask per type (full, sliding, chunked) and hands it to each layer of that type as
    `attention_mask`. This object takes the same route, so that layers need no further argument and the recomputation
    of gradient checkpointing sees what the forward saw (the other carriers of the tree: `attention/context.py`).

    A query attends to a key exactly when the key is the query itself or one of its ancestors, and the model's own
    `mask_function` allows it **at their depths**: sliding windows and chunks count depth, not index.

    Not a dataclass: FSDP looks for tensors in those, and would hand each layer a copy in another precision.

    Args:
        tree (`Tree`):
            Tree of the row.
        mask_function (`Callable`):
            The model's own rule, as transformers defines it.
        local_size (`int`, *optional*):
            Upper bound of how many tokens back the rule looks (window or chunk), in tokens.
    """

    def __init__(self, tree: Tree, mask_function: MaskFunction, local_size: int | None = None) -> None:
        self.tree, self.mask_function, self.local_size = tree, mask_function, local_size
        self._built: dict[tuple[object, ...], Any] = {}

    def build_once(self, build: Callable[..., T], *arguments: object) -> T:
        """
        Return `build(self, *arguments)`, built once and shared by all layers of this mask type.

        Args:
            build (`Callable`):
                Function of this mask and of `arguments`.
            *arguments (`object`):
                Hashable arguments.

        Returns:
            `T`: What `build` returned.
        """
        key = (build, *arguments)
        if key not in self._built:
            self._built[key] = build(self, *arguments)
        result: T = self._built[key]
        return result

    def on(self, device: torch.device) -> TreeMask:
        """
        Return this mask on the device of a layer (see [`Tree.on`]).

        Args:
            device (`torch.device`):
                Device of the layer's tensors.
        """
        return self if device == self.tree.depth.device else self.build_once(_copy_to, device)

    @cached_property
    def rule(self) -> MaskRule | None:
        """The rule on this tree, `None` where `mask_function` says more than a rule can."""
        rule = MaskRule.from_mask_function(self.mask_function)
        if rule is not None and rule.kind is not RuleKind.CAUSAL and self.tree.max_depth < rule.size:
            return MaskRule(RuleKind.CAUSAL)  # no path is longer than the window or the chunk
        return rule

    @property
    def is_causal(self) -> bool:
        """Whether every ancestor is visible, so that no mask has to be evaluated."""
        return self.rule is not None and self.rule.kind is RuleKind.CAUSAL

    def evaluate(self, query_depth: torch.Tensor, key_depth: torch.Tensor) -> torch.Tensor:
        """
        Evaluate the model's rule between tokens of one path.

        Args:
            query_depth (`torch.Tensor` of shape `(num_queries,)`, `torch.int64`):
                Depths of the queries.
            key_depth (`torch.Tensor` of shape `(num_keys,)`, `torch.int64`):
                Depths of the keys, all on the path of each query or below it.

        Returns:
            `torch.Tensor` of shape `(num_queries, num_keys)`, `torch.bool`: `True` where the query attends.
        """
        query, key = query_depth[:, None], key_depth[None, :]
        if self.rule is not None:  # the model's own function may hold tensors of another device
            return (key <= query) & (key >= self.rule.first_depth(query))
        zero = torch.zeros((), dtype=torch.long, device=query_depth.device)
        return self.mask_function(zero, zero, query, key) & (key <= query)


def _copy_to(mask: TreeMask, device: torch.device) -> TreeMask:
    return TreeMask(mask.tree.on(device), mask.mask_function, mask.local_size)


def tree_mask_or(plain_mask: Callable[..., Any]) -> Callable[..., Any]:
    """
    Return the mask function to register with transformers: a `TreeMask` on a tree, the stock mask on other batches.

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
