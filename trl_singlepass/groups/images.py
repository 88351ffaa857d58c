"""Images of a batch as TRL passes them to a model, found again in its lines: each distinct one is encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from trl.trainer.utils import split_pixel_values_by_grid

from ..trees.image_features import NO_FEATURE, ImageReference


ImageInputs = dict[str, torch.Tensor]
"""What a model reads of images, such as `pixel_values`."""
_GRID = "image_grid_thw"
_OF_IMAGES = (
    "pixel_values", _GRID, "image_position_ids", "pixel_attention_mask", "spatial_shapes", "image_sizes"
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LineImages:
    """
    The distinct images of N lines of T tokens.

    An image is one of the prompt where the model reads a grid for each, and otherwise all those of the line together:
    what TRL passes for a line can then not be divided.
    """

    features: NDArray[np.int64]  # (N, T): the feature that each token shows, -1 for text
    references: tuple[ImageReference, ...]  # in the order of their features; each names its place in `inputs`
    inputs: Sequence[ImageInputs]  # what the model reads of each distinct image

    @classmethod
    def find(cls, is_placeholder: NDArray[np.bool_], batch: Mapping[str, Any]) -> LineImages | None:
        """Return the images that tokens, `(N, T)`, show; `None` if they do not have one placeholder per feature."""
        lines, inputs = number_images(batch)
        counts = is_placeholder.sum(axis=1)
        sizes: dict[int, int] = {}
        for line, count in zip(lines, counts.tolist(), strict=True):
            parts = [int(inputs[i][_GRID].prod()) if _GRID in inputs[i] else 1 for i in line]
            for image, part in zip(line, parts, strict=True):
                size, rest = divmod(count * part, sum(parts))
                if rest or size == 0 or sizes.setdefault(image, size) != size:
                    return None
            if count and not line:
                return None
        references = tuple(ImageReference(str(i), sizes[i], i) for i in range(len(inputs)))
        starts = np.cumsum([0, *(image.num_features for image in references)])
        features = np.full(is_placeholder.shape, NO_FEATURE)
        shown = [np.arange(starts[image], starts[image + 1]) for line in lines for image in line]
        features[is_placeholder] = np.concatenate([np.empty(0, np.int64), *shown])
        return cls(features, references, inputs)

    def of_lines(self, start: int, end: int) -> LineImages:
        """Return the images of some of the lines."""
        return replace(self, features=self.features[start:end])

    def load(self, images: Sequence[ImageReference]) -> ImageInputs:
        """Return what the model reads of some images, in their order; integers lie on the host, which reads them."""
        chosen = [self.inputs[image.source] for image in images]
        joined = {name: torch.cat([inputs[name] for inputs in chosen]) for name in chosen[0]}
        return {name: value if value.is_floating_point() else value.cpu() for name, value in joined.items()}


def number_images(batch: Mapping[str, Any]) -> tuple[list[list[int]], list[ImageInputs]]:
    """Return the numbers of the images that each line of a batch shows, and what the model reads of each of them."""
    by_line = split_pixel_values_by_grid({name: value for name, value in batch.items() if value is not None})
    names = [name for name in _OF_IMAGES if name in by_line]
    distinct: list[ImageInputs] = []
    lines: list[list[int]] = []
    for line, number in enumerate(by_line["num_images"]):
        values = {name: by_line[name] for name in names} if number else {}
        own = {name: x[line : line + 1] if isinstance(x, torch.Tensor) else x[line] for name, x in values.items()}
        shown = [own] if own else []
        if _GRID in own:
            pixels = torch.split(own["pixel_values"], own[_GRID].prod(dim=-1).tolist())
            shown = [{"pixel_values": part, _GRID: grid[None]} for part, grid in zip(pixels, own[_GRID], strict=True)]
        lines.append([_number(image, distinct) for image in shown])
    return lines, distinct


def _number(image: ImageInputs, distinct: list[ImageInputs]) -> int:
    """Return the number of an image among the distinct ones, to which a new one is added."""
    for number, other in enumerate(distinct):
        if all(torch.equal(value, other[name]) for name, value in image.items()):
            return number
    distinct.append(image)
    return len(distinct) - 1
