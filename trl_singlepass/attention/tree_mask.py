"""The attention mask that each layer receives: the tree of the row together with the model's own rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from ..trees.rows import TreePlan
from .context import Tree, current_tree
from .mask_rules import ImageRule, MaskFunction, MaskRule, RuleKind, reads_positions


T = TypeVar("T")


class TreeMask:
    """
    Attention mask of one mask type of the model, on a tree.

    transformers builds one mask per type (full, sliding, chunked) and hands it to each layer of that type as
    `attention_mask`. This object takes the same route (the other carriers of the tree: `attention/context.py`).

    A query attends to a key exactly when the key is the query itself or one of its ancestors, and the model's own
    `mask_function` allows it **at their depths**: sliding windows and chunks count depth, not index. Where the tokens
    of an image see each other in both directions, later tokens of the query's own image join its ancestors.

    Not a dataclass: FSDP looks for tensors in those, and would hand each layer a copy in another precision.

    `local_size` is an upper bound of how many tokens back the rule looks. Raises `ValueError` for a rule that is not
    known and looks tokens up by their position in the row.
    """

    def __init__(self, tree: Tree, mask_function: MaskFunction, local_size: int | None = None) -> None:
        self.tree, self.mask_function = tree, mask_function
        own_rule = MaskRule.from_mask_function(mask_function)
        self.local_size = own_rule.size or None if local_size is None and own_rule is not None else local_size
        self._built: dict[tuple[object, ...], Any] = {}
        if self.rule is None and reads_positions(mask_function):
            raise ValueError(
                f"The model's mask rule ({getattr(mask_function, '__qualname__', mask_function)}) looks tokens up by "
                "their position in a sequence, and in a row of branches that is another token's. Train this model on "
                "one sample per turn (N-pass) with TRL's SFTTrainer."
            )

    def __getitem__(self, index: object) -> TreeMask:
        """Return this mask where a model cuts masks to the tokens whose logits it keeps (Gemma 4) and keeps all."""
        parts = index if isinstance(index, tuple) else (index,)
        if any(part not in (slice(None), slice(0, None)) for part in parts):
            raise ValueError(
                f"The model takes the part [{', '.join(map(str, parts))}] of its attention mask, and the last tokens "
                "of a row are those of its last branch. Call it on a tree without a number of `logits_to_keep`."
            )
        return self

    def build_once(self, build: Callable[..., T], *arguments: object) -> T:
        """Return `build(self, *arguments)`, built once and shared by all layers of this mask type."""
        key = (build, *arguments)
        if key not in self._built:
            self._built[key] = build(self, *arguments)
        result: T = self._built[key]
        return result

    def on(self, device: torch.device) -> TreeMask:
        """Return this mask on the device of a layer (see [`Tree.on`])."""
        return self if device == self.tree.depth.device else self.build_once(_copy_to, device)

    @cached_property
    def rule(self) -> MaskRule | None:
        """The rule on this tree, `None` where `mask_function` says more than a rule can."""
        rule = MaskRule.from_mask_function(self.mask_function)
        if rule is None:
            return None
        if rule.images and not self.tree.plan.images:
            rule = replace(rule, images=ImageRule.NONE)
        if rule.kind is not RuleKind.CAUSAL and self.tree.max_depth < rule.size:
            # No path is longer than the window or the chunk.
            images = ImageRule.WHOLE if rule.images else ImageRule.NONE
            return MaskRule(RuleKind.CAUSAL, images=images)
        return rule

    @property
    def plan(self) -> TreePlan:
        """Structure of the row; if the tokens of an image see each other, each image is a run of its own."""
        return self.tree.image_plan if self.rule is not None and self.rule.images else self.tree.plan

    @property
    def is_causal(self) -> bool:
        """Whether every ancestor is visible, so that no mask has to be evaluated (of an image's run, every token)."""
        return self.rule is not None and self.rule.kind is RuleKind.CAUSAL

    def evaluate(
        self, query_depth: torch.Tensor, key_depth: torch.Tensor, image: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """
        Return where queries attend by the model's rule between tokens of one path, `(num_queries, num_keys)`, bool.

        Takes depths of queries, `(num_queries,)`, and of keys, `(num_keys,)`, int64; all keys are on the path of each
        query or below it. If all queries belong to one image whose tokens see each other, `image` is the depth of its
        first token, and the depth just past its last token.
        """
        query, key = query_depth[:, None], key_depth[None, :]
        if self.rule is not None:  # the model's own function may hold tensors of another device
            if image is None:
                return (key <= query) & (key >= self.rule.first_depth(query))
            first, end = image
            return (key < end) & (key >= self.rule.first_depth(query, torch.full_like(query, first)))
        zero = torch.zeros((), dtype=torch.long, device=query_depth.device)
        return self.mask_function(zero, zero, query, key) & (key <= query)


def _copy_to(mask: TreeMask, device: torch.device) -> TreeMask:
    return TreeMask(mask.tree.on(device), mask.mask_function, mask.local_size)


def tree_mask_or(plain_mask: Callable[..., Any]) -> Callable[..., Any]:
    """
    Return the mask function to register with transformers: a `TreeMask` on a tree, the stock mask on other batches
    (generation, plain rows).
    """

    def build_mask(**kwargs: Any) -> Any:
        tree = current_tree()
        if tree is None:
            return plain_mask(**kwargs)
        return TreeMask(tree, kwargs["mask_function"], kwargs.get("local_size"))

    return build_mask
