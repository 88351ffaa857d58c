"""
Image features on a tree: computed once per distinct image, shown wherever a token of the row stands for them.

A model of transformers computes the features of its images in `get_image_features` and scatters them over the
placeholder tokens of the batch, in their order. On a tree, an image can stand in several places, or in one place for
many samples. So that method runs on the distinct images of the row, and returns one feature per placeholder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..trees.rows import TreePlan


# What models scatter over their tokens; some project the hidden states of their tower afterwards (Llama 4).
_FEATURES = ("pooler_output", "last_hidden_state")
# Features for several layers of the language model (Qwen3-VL), each like the ones above.
_LAYERED_FEATURES = "deepstack_features"


@dataclass(frozen=True, slots=True, eq=False)
class ShownFeatures:
    """Which feature each placeholder of a row shows."""

    # (num_placeholders,), int64: features, counted over the row's distinct images, in placeholder order
    index: torch.Tensor
    sizes: tuple[int, ...]  # number of features of each distinct image; empty if the row shows no image

    @classmethod
    def in_row(cls, image_features: torch.Tensor, plan: TreePlan) -> ShownFeatures:
        """
        Return the features that a row shows, without waiting for the device.

        `image_features` has shape `(1, row_length)`, int64: the feature that each token shows, -1 for text.
        """
        parts = [image_features[0, start:end] for start, end in plan.images]
        return cls(torch.cat(parts) if parts else image_features[0, :0], plan.image_sizes)


_shown: ContextVar[ShownFeatures | None] = ContextVar("trl_singlepass_shown_features", default=None)


@contextmanager
def showing(features: ShownFeatures | None) -> Iterator[None]:
    """Run the model calls inside on a row that shows some features; `None` leaves the model as it is."""
    token = _shown.set(features)
    try:
        yield
    finally:
        _shown.reset(token)


def image_module(model: nn.Module) -> nn.Module | None:
    """
    Return the part of a model whose `get_image_features` computes them, `None` if there is none. Outer classes pass
    the call on to the innermost.
    """
    found = [module for module in model.modules() if hasattr(type(module), "get_image_features")]
    return found[-1] if found else None


def enable_image_features(module: nn.Module) -> None:
    """
    Make a model return one feature per placeholder where a row shows images; other calls are not changed. Changes the
    module, which [`image_module`] returned, in place.
    """
    # Bound to the module, so that a copy of the model gets a method of its own.
    module.get_image_features = MethodType(_show_on_trees, module)  # type: ignore[assignment]


def _one_feature_per_placeholder(module: Any, *args: Any, **kwargs: Any) -> Any:
    outputs = type(module).get_image_features(module, *args, **kwargs)
    shown = _shown.get()
    if shown is None:
        return outputs
    if not isinstance(outputs, ModelOutput):  # transformers before 5.14
        return _gathered(outputs, shown, module)
    for name in _FEATURES:
        features = outputs.get(name)
        if features is not None and (name == _FEATURES[0] or _num_features(features) == sum(shown.sizes)):
            outputs[name] = _gathered(features, shown, module)
    layered = outputs.get(_LAYERED_FEATURES)
    if layered is not None:
        outputs[_LAYERED_FEATURES] = type(layered)(_gathered_layer(layer, shown, module) for layer in layered)
    return outputs


# Compiled models leave this function, which reads a context variable, and compile the encoder that it calls.
_show_on_trees: Any = torch.compiler.disable(_one_feature_per_placeholder, recursive=False)  # type: ignore[no-untyped-call]


def _gathered_layer(layer: Any, shown: ShownFeatures, module: nn.Module) -> Any:
    """Features of one layer, which some models store beside the number of the layer."""
    if isinstance(layer, tuple) and isinstance(layer[0], int):
        return (layer[0], _gathered(layer[1], shown, module))
    return _gathered(layer, shown, module)


def _gathered(features: torch.Tensor | Sequence[torch.Tensor], shown: ShownFeatures, module: nn.Module) -> Any:
    """Features by placeholder, in the form that they had by image: a tensor, or a sequence of them."""
    parts = [features] if isinstance(features, torch.Tensor) else list(features)
    counts = [part.numel() // part.shape[-1] for part in parts]
    by_image = len(counts) == len(shown.sizes) and len(counts) > 1
    if shown.sizes and (sum(counts) != sum(shown.sizes) or (by_image and tuple(counts) != shown.sizes)):
        raise ValueError(
            f"{type(module).__name__} computes {counts} features of the images of a row, and its tokens stand for "
            f"{list(shown.sizes)}. Load the processor that belongs to the model."
        )
    flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    by_placeholder = flat.index_select(0, shown.index.to(flat.device))
    by_placeholder = by_placeholder.view(*[1] * (parts[0].dim() - 2), *by_placeholder.shape)
    return by_placeholder if isinstance(features, torch.Tensor) else (by_placeholder,)


def _num_features(features: Any) -> int:
    return features.numel() // features.shape[-1] if isinstance(features, torch.Tensor) else -1
