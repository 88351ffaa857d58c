"""What a model reads of a row with images, and which models a tree cannot give what they read."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..trees.rows import TreePlan
from .features import ShownFeatures, enable_image_features, image_module, showing
from .positions import PathPositions, UnsupportedImagesError


# What models call the kind of each token: 0 for text, 1 for a part of an image.
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
_WAY_OUT = "Train it on one sample per turn (N-pass) with TRL's SFTTrainer, or on text alone."


@dataclass(frozen=True, slots=True, eq=False)
class ImageReader:
    """How a model reads rows with images."""

    token_types: tuple[str, ...]  # names under which its forward takes the kind of each token
    positions: PathPositions | None  # of its tokens, if they have several dimensions

    @classmethod
    def enable(cls, model: nn.Module) -> ImageReader:
        """
        Make a model show images on trees, or refuse it.

        The model, without adapters or wrappers, is changed in place. Raises `UnsupportedImagesError` if it reads
        images in a way that a tree cannot give it.
        """
        module = check_reads_images(model)
        positions = PathPositions.from_model(model)
        enable_image_features(module)
        parameters = inspect.signature(type(model).forward).parameters
        return cls(tuple(name for name in TOKEN_TYPES if name in parameters), positions)

    def row_inputs(
        self,
        input_ids: NDArray[np.int64],
        image_features: NDArray[np.int64],
        plan: TreePlan,
        images: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """
        Return what the model's forward reads of the tokens of a row besides their ids, mask and depths.

        `input_ids` and `image_features` (the feature that each token shows, -1 for text) have shape `(row_length,)`,
        int64; `images` is what the model reads of the images of the row.
        """
        inputs = dict.fromkeys(self.token_types, torch.from_numpy((image_features >= 0).astype(np.int64))[None])
        if self.positions is not None and plan.images:
            inputs["position_ids"] = self.positions.in_row(input_ids, image_features, plan, images)
        return inputs


def showing_images(image_features: torch.Tensor | None, plan: TreePlan) -> AbstractContextManager[None]:
    """
    Run the model calls inside on the images of a row, if it is of a dataset with images.

    `image_features` has shape `(1, row_length)`, int64: the feature that each token shows, -1 for text.
    """
    return showing(None if image_features is None else ShownFeatures.in_row(image_features, plan))


def check_reads_images(model: nn.Module) -> nn.Module:
    """
    Refuse a model that a tree cannot give its images; return its part that computes features of images.

    The model has no adapters or wrappers. Raises `UnsupportedImagesError` if it has no such part, does not put one
    feature in the place of each placeholder, asks for more about each token, lets images see each other, normalises
    over them, or computes positions from more than a grid.
    """
    module = image_module(model)
    if module is None:
        raise UnsupportedImagesError(
            f"{type(model).__name__} reads no images (it has no get_image_features), and the dataset has some. Remove "
            "them, columns and parts of messages, to train on text, or load a model that reads images."
        )
    checks = (
        _does_not_replace_placeholders(module),
        _asks_for_more(model),
        _mixes_images(module),
        _batch_norm(model),
    )
    if reason := next(filter(None, checks), None):
        raise UnsupportedImagesError(f"{type(model).__name__} {reason}. {_WAY_OUT}")
    PathPositions.from_model(model)  # refuses positions that rows cannot give
    return module


def _does_not_replace_placeholders(module: nn.Module) -> str | None:
    names = _names(type(module).forward)
    if "inputs_merger" in names:
        names |= _names(type(module).inputs_merger)  # type: ignore[attr-defined]
    if {"get_image_features", "masked_scatter"} <= names:
        return None
    return "does not put the features of its images in the places of placeholder tokens"


def _asks_for_more(model: nn.Module) -> str | None:
    asked = [
        name
        for name in inspect.signature(type(model).forward).parameters
        if name.endswith("token_type_ids") and name not in TOKEN_TYPES
    ]
    return f"reads {asked[0]}, which say more about a token than whether it belongs to an image" if asked else None


def _mixes_images(module: nn.Module) -> str | None:
    """Refuse images that see more than themselves in both directions: all others, or the whole prompt."""
    names = _names(type(module).forward)
    if not names & {"block_sequence_ids", "get_block_sequence_ids_for_mask"}:
        return None
    block_ids = getattr(sys.modules[type(module).__module__], "get_block_sequence_ids_for_mask", None)
    # Two images of two tokens with text around them: each is a block of its own.
    kinds, expected = [[0, 1, 1, 0, 1, 1, 0]], [[-1, 0, 0, -1, 1, 1, -1]]
    if block_ids is not None and block_ids(torch.tensor(kinds), torch.device("cpu")).tolist() == expected:
        return None
    return (
        "lets the tokens of images see more than their own image in both directions, so that what turns share is not "
        "the same in all of them"
    )


def _batch_norm(model: nn.Module) -> str | None:
    """Refuse statistics over a batch, which holds the images of one prompt in N-pass and those of a row here."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
            name = type(module).__name__
            return f"normalises over all images of a batch in its {name}, so that their features depend on each other"
    return None


def _names(function: Any) -> set[str]:
    """Names that a function calls, binds or uses as keys."""
    code = inspect.unwrap(function).__code__
    texts = {text for text in code.co_consts if isinstance(text, str)}
    keywords = {name for part in code.co_consts if isinstance(part, tuple) for name in part if isinstance(name, str)}
    return {*code.co_names, *code.co_varnames, *texts, *keywords}
