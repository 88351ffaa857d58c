"""A model that is borrowed for a comparison: put on stock layers or on trees, and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..attention.registry import set_text_attention
from ..data.collator import LoadImages
from ..engine.borrowed_state import in_evaluation_mode
from ..engine.check.separate_samples import get_device
from ..engine.enable import disable_tree, enable_tree, takes_attention_from_outside, without_adapters
from ..images.reading import ImageReader, image_module
from ..recurrent.layer import runs_on_trees
from .npass import get_text_config
from .single_pass import RowImages


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def left_as_found(model: PreTrainedModel) -> Iterator[str | None]:
    """Put the model on stock layers in evaluation mode; yield the tree attention it came with, if any."""
    base = without_adapters(model)
    attention = get_text_config(base)._attn_implementation
    was_on_trees = attention.startswith("tree_") or any(map(runs_on_trees, base.modules()))
    devices = [get_device(model)] if get_device(model).type == "cuda" else []
    if was_on_trees:
        disable_tree(base, "sdpa" if base._supports_sdpa else "eager")
    try:
        with in_evaluation_mode(model), torch.random.fork_rng(devices), torch.enable_grad():
            yield attention if was_on_trees else None
    finally:
        if was_on_trees:
            enable_tree(base)
            _set_attention(base, attention)


@contextmanager
def on_trees(model: PreTrainedModel, tree_attention: str | None) -> Iterator[None]:
    """Run a model on trees, with the tree attention that it came with, if any; then on stock layers again."""
    base = without_adapters(model)
    before = enable_tree(base)
    try:
        if tree_attention is not None:
            _set_attention(base, tree_attention)
        yield
    finally:
        disable_tree(base, before)


def _set_attention(base: PreTrainedModel, implementation: str) -> None:
    if takes_attention_from_outside(base):  # models with recurrent layers only cannot
        set_text_attention(base, implementation)


@contextmanager
def reading_images(model: PreTrainedModel, load_images: LoadImages | None) -> Iterator[RowImages | None]:
    """Make the model read images on trees; yield how, `None` if there are no images to load."""
    base = without_adapters(model)
    if load_images is None:
        yield None
        return
    reader = ImageReader.enable(base)
    try:
        yield RowImages(reader, load_images)
    finally:
        del image_module(base).get_image_features  # type: ignore[union-attr]


@contextmanager
def weights_moved_by_one_rounding(model: nn.Module) -> Iterator[None]:
    """Multiply each weight by 1 + eps or 1 - eps at random, then restore the original tensors."""
    kept = {parameter: parameter.data for parameter in model.parameters() if parameter.is_floating_point()}
    try:
        for seed, (parameter, data) in enumerate(kept.items()):
            generator = torch.Generator(data.device).manual_seed(seed)
            signs = torch.randint(0, 2, data.shape, generator=generator, device=data.device, dtype=torch.int8) * 2 - 1
            parameter.data = data * (1 + torch.finfo(data.dtype).eps * signs).to(data.dtype)
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data
