"""
Positions of several dimensions (time, height and width of an image's tokens), as each sample's own path has them.

Models with such positions compute them for a whole sequence, in `get_rope_index`: text counts on, an image spreads
over height and width, and the text behind it goes on from the larger of the two. On a tree, that method runs on each
path from a root to a leaf. A token's positions depend on nothing behind it, so paths agree where they share tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..trees.image_features import shown_numbers
from ..trees.rows import TreePlan


_GRID = "image_grid_thw"
# What `get_rope_index` may ask for besides; videos and sound are not given.
_KNOWN = frozenset(
    {
        "input_ids", "mm_token_type_ids", _GRID, "attention_mask", "video_grid_thw", "second_per_grid_ts",
        "second_per_grids", "audio_seqlens", "use_audio_in_video", "kwargs",
    }
)  # fmt: skip


class UnsupportedImagesError(ValueError):
    """A model that reads images in a way that a tree cannot give it."""


@dataclass(frozen=True, slots=True, eq=False)
class PathPositions:
    """
    Positions of a row's tokens in all dimensions of the model.

    Computed from integers on the CPU, in the workers that load batches: it holds the method of the model's class and
    the configuration that the method reads, but no parameters.
    """

    module: Any  # instance of the class that defines `get_rope_index`, with a configuration and nothing else
    parameters: frozenset[str]  # names of the parameters of that method

    @classmethod
    def from_model(cls, model: nn.Module) -> PathPositions | None:
        """
        Return the positions of a model, `None` if a token's position is its depth.

        Raises `UnsupportedImagesError` if the method that computes positions reads what the rows do not have.
        """
        found: list[Any] = [module for module in model.modules() if hasattr(module, "get_rope_index")]
        if not found:
            return None
        parameters = frozenset(inspect.signature(found[-1].get_rope_index).parameters)
        if _GRID not in parameters or (unknown := parameters - _KNOWN):
            what = ", ".join(sorted(unknown)) if _GRID in parameters else f"no {_GRID}"
            raise UnsupportedImagesError(
                f"{type(found[-1]).__name__} computes the positions of image tokens from {what}, which rows of a "
                "single pass do not have. Train it on one sample per turn (N-pass) with TRL's SFTTrainer."
            )
        return cls(_without_parameters(found[-1]), parameters)

    def in_row(
        self,
        input_ids: NDArray[np.int64],
        image_features: NDArray[np.int64],
        plan: TreePlan,
        image_inputs: Mapping[str, Tensor],
    ) -> Tensor:
        """
        Return the positions of a row, `(num_dimensions, 1, row_length)`, int64.

        `input_ids` and `image_features` have shape `(row_length,)`; `image_inputs` is what the model reads of its
        images.
        """
        positions: Tensor | None = None
        is_set = np.zeros(plan.length, np.bool_)
        for run in plan.runs:
            path = run.path_positions
            images = shown_numbers(image_features[path], plan.image_sizes)
            own = self._on_path(input_ids[path], image_features[path] >= 0, image_inputs[_GRID][images])
            if positions is None:
                positions = own.new_zeros(own.shape[0], plan.length)
            shared = torch.from_numpy(is_set[path])
            assert torch.equal(positions[:, path[is_set[path]]], own[:, shared]), "samples disagree on shared tokens"
            positions[:, path] = own
            is_set[path] = True
        assert positions is not None, "a row has at least one token"
        return positions[:, None]

    def _on_path(self, tokens: NDArray[np.int64], is_image: NDArray[np.bool_], grid: Tensor) -> Tensor:
        """Positions along one path, shape `(num_dimensions, path_length)`."""
        input_ids = torch.from_numpy(tokens)[None]
        given = {
            "input_ids": input_ids,
            "mm_token_type_ids": torch.from_numpy(is_image.astype(np.int64))[None],
            _GRID: grid if len(grid) else None,
            "attention_mask": torch.ones_like(input_ids),
        }
        positions, _ = self.module.get_rope_index(**{name: x for name, x in given.items() if name in self.parameters})
        own: Tensor = positions[:, 0].long()
        return own


def _without_parameters(module: nn.Module) -> nn.Module:
    """A module of the same class with its configuration and plain settings, but without parameters and submodules."""
    bare = type(module).__new__(type(module))
    nn.Module.__init__(bare)
    plain = (bool, int, float, str, type(None))
    bare.__dict__.update({name: value for name, value in vars(module).items() if isinstance(value, plain)})
    bare.config = module.config
    return bare
