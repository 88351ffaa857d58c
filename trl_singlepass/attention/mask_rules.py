"""Mask rules that kernels compute themselves: causal, sliding window and chunk, all counted in depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.masking_utils import causal_mask_function


Depths = TypeVar("Depths", torch.Tensor, NDArray[np.int64])
MaskFunction = Callable[..., torch.Tensor]
"""transformers' description of a mask: `mask_function(batch, head, query, key)`, `True` where the query attends."""


class RuleKind(StrEnum):
    """Which ancestors a token attends to."""

    CAUSAL = "causal"
    """All of them."""
    WINDOW = "window"
    """The last `size` tokens of the path, the token itself included."""
    CHUNK = "chunk"
    """Those in the same chunk of `size` depths."""


@dataclass(frozen=True, slots=True)
class MaskRule:
    """
    Which ancestors a token attends to: all from some depth on.

    Args:
        kind (`RuleKind`):
            Kind of rule.
        size (`int`):
            Size of the window or chunk in tokens; 0 for a causal rule.
    """

    kind: RuleKind
    size: int = 0

    @classmethod
    def from_mask_function(cls, mask_function: MaskFunction) -> MaskRule | None:
        """
        Recognise a mask function of transformers.

        Args:
            mask_function (`Callable`):
                The model's own rule.

        Returns:
            `MaskRule` or `None`: The rule, `None` where the function says more than a rule can.
        """
        if mask_function is causal_mask_function:
            return cls(RuleKind.CAUSAL)
        parts = _combined(mask_function)
        if len(parts) != 2 or "causal_mask_function" not in {_name(part) for part in parts}:
            return None
        for part in parts:
            sizes = _captured(part)
            if _name(part).startswith("sliding_window_overlay."):
                return cls(RuleKind.WINDOW, int(sizes["sliding_window"]))
            if _name(part).startswith("chunked_overlay."):
                return cls(RuleKind.CHUNK, int(sizes["chunk_size"]))
        return None

    def first_depth(self, depth: Depths) -> Depths:
        """
        Return the depth of the first ancestor that a token attends to; with a window, it can be negative.

        A token at depth 7 attends from depth 0 on if causal, from depth 5 on with a window of 3, and from depth 6 on
        with chunks of 3 (depths 6, 7 and 8 are a chunk).

        Args:
            depth (`torch.Tensor` or `numpy.ndarray`):
                Depths of tokens.
        """
        if self.kind is RuleKind.WINDOW:
            return depth - (self.size - 1)
        if self.kind is RuleKind.CHUNK:
            return depth - depth % self.size
        return depth * 0


def _combined(mask_function: MaskFunction) -> tuple[MaskFunction, ...]:
    """Parts of a mask function that transformers' `and_masks` made."""
    if not _name(mask_function).startswith("and_masks."):
        return ()
    parts: tuple[MaskFunction, ...] = _captured(mask_function)["mask_functions"]
    return parts


def _name(function: MaskFunction) -> str:
    return getattr(function, "__qualname__", "")


def _captured(function: MaskFunction) -> dict[str, Any]:
    """Variables that a function captured from the function that made it."""
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
