"""Tree attention: registered with transformers once, chosen by the model's own `attn_implementation`."""

from __future__ import annotations

from .context import Tree
from .registry import TREE_ATTENTION
from .tree_mask import TreeMask


__all__ = ["TREE_ATTENTION", "Tree", "TreeMask"]
