"""
Mask rules that kernels compute themselves: causal, sliding window and chunk, all counted in depth.

Some models let the tokens of an image see each other in both directions (Gemma 3). transformers writes that as one
more function, `blockwise_overlay`, which compares the blocks of two positions in the row. The overlay is recognised,
and the blocks themselves come from the tree instead: [`TreePlan.images`].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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


class ImageRule(StrEnum):
    """What a token of an image sees of its own image, besides what every token sees."""

    NONE = ""
    """Nothing: images are read in order, as text is."""
    WHOLE = "whole"
    """All of it, later tokens included."""
    LOCAL = "local"
    """What the window allows, which bounds only how far back it looks: the rest of the image is always visible."""


@dataclass(frozen=True, slots=True)
class MaskRule:
    """Which tokens of its path a token attends to: all from some depth on, up to itself or to the end of its image."""

    kind: RuleKind
    size: int = 0  # of the window or chunk in tokens; 0 for a causal rule
    images: ImageRule = ImageRule.NONE

    @classmethod
    def from_mask_function(cls, mask_function: MaskFunction) -> MaskRule | None:
        """Recognise a mask function of transformers; return `None` where it says more than a rule can."""
        if mask_function is causal_mask_function:
            return cls(RuleKind.CAUSAL)
        for first, second in _pairs(mask_function, "and_masks"):
            rule, sizes = cls.from_mask_function(second), _captured(first)
            if rule is None or rule.kind is not RuleKind.CAUSAL:
                continue
            images = ImageRule.LOCAL if rule.images else ImageRule.NONE
            if _name(first).startswith("sliding_window_overlay."):
                return cls(RuleKind.WINDOW, int(sizes["sliding_window"]), images)
            if _name(first).startswith("chunked_overlay.") and not images:
                return cls(RuleKind.CHUNK, int(sizes["chunk_size"]))
        for first, second in _pairs(mask_function, "or_masks"):
            rule = cls.from_mask_function(second)
            if _name(first).startswith("blockwise_overlay.") and rule is not None and not rule.images:
                return replace(rule, images=ImageRule.WHOLE)
        return None

    def first_depth(self, depth: Depths, image_depth: Depths | None = None) -> Depths:
        """
        Return the depth of the first ancestor that a token attends to; with a window, it can be negative.

        A token at depth 7 attends from depth 0 on if causal, from depth 5 on with a window of 3, and from depth 6 on
        with chunks of 3 (depths 6, 7 and 8 are a chunk). If it belongs to an image that starts at depth 4 and is seen
        as a whole, it attends from depth 4 on.

        `image_depth` is, for tokens of images, the depth of the first token of the image; for others, their own depth.
        """
        if self.kind is RuleKind.WINDOW:
            first = depth - (self.size - 1)
        elif self.kind is RuleKind.CHUNK:
            first = depth - depth % self.size
        else:
            return depth * 0
        if self.images is ImageRule.WHOLE and image_depth is not None:
            smaller: Depths = first - (first - image_depth).clip(min=0)  # for both kinds of arrays
            return smaller
        return first


def reads_positions(mask_function: MaskFunction) -> bool:
    """
    Return whether a mask function, or one that it combines, looks tokens up in a tensor, by their position in the row.

    On a tree, functions are evaluated at depths, where such a function would look up other tokens.
    """
    captured = list(_captured(mask_function).values())
    parts = [*captured, *(part for value in captured if isinstance(value, tuple) for part in value)]
    return any(
        value.numel() > 1 if isinstance(value, torch.Tensor) else callable(value) and reads_positions(value)
        for value in parts
    )


def _pairs(mask_function: MaskFunction, combination: str) -> tuple[tuple[MaskFunction, MaskFunction], ...]:
    """Both orders of the two parts of a mask function that transformers' `and_masks` or `or_masks` made."""
    if not _name(mask_function).startswith(f"{combination}."):
        return ()
    parts: tuple[MaskFunction, ...] = _captured(mask_function)["mask_functions"]
    return ((parts[0], parts[1]), (parts[1], parts[0])) if len(parts) == 2 else ()


def _name(function: MaskFunction) -> str:
    return getattr(function, "__qualname__", "")


def _captured(function: MaskFunction) -> dict[str, Any]:
    """Variables that a function captured from the function that made it."""
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
