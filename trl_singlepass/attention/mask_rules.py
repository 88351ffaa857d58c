"""Mask rules that a kernel can compute on its own: causal, sliding window and chunk, all by depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from .tree_mask import TreeMask


Depths = TypeVar("Depths", torch.Tensor, NDArray[np.int64])


@dataclass(frozen=True, slots=True)
class Rule:
    """
    Which ancestors a token attends to: all from some depth on.

    Args:
        kind (`str`):
            `"causal"` (all ancestors), `"window"` (the last `size` tokens of the path, the token itself included) or
            `"chunk"` (ancestors in the same chunk of `size` depths).
        size (`int`):
            Size of the window or chunk in tokens; 0 where all ancestors are visible.
    """

    kind: str
    size: int = 0

    def first_depth(self, depth: Depths) -> Depths:
        """
        Return the depth of the first ancestor that a token attends to; of a window, it can be negative.

        Args:
            depth (`torch.Tensor` or `numpy.ndarray`):
                Depths of tokens.
        """
        if self.kind == "window":
            return depth - (self.size - 1)
        if self.kind == "chunk":
            return depth - depth % self.size
        return depth * 0


def rule_of(mask: TreeMask) -> Rule | None:
    """
    Return the rule of a mask type, `None` where the model's own `mask_function` says more than a rule can.

    Args:
        mask (`TreeMask`):
            Mask type of the model.
    """
    if mask.is_causal:
        return Rule("causal")
    parts = _combined(mask.mask_function)
    if len(parts) != 2 or "causal_mask_function" not in {_name(part) for part in parts}:
        return None
    for part in parts:
        sizes = _captured(part)
        if _name(part).startswith("sliding_window_overlay."):
            return Rule("window", int(sizes["sliding_window"]))
        if _name(part).startswith("chunked_overlay."):
            return Rule("chunk", int(sizes["chunk_size"]))
    return None


def _combined(mask_function: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """Parts of a mask function that transformers' `and_masks` made."""
    if not _name(mask_function).startswith("and_masks."):
        return ()
    parts: tuple[Callable[..., Any], ...] = _captured(mask_function)["mask_functions"]
    return parts


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", "")


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function sees of the function that made it."""
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
