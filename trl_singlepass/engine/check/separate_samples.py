"""Separate samples as a model reads them without a tree: the other side of every comparison."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ...data.collator import LoadImages
from ...images.reading import TOKEN_TYPES
from ...trees.image_features import ImageReference, shown_images
from ...trees.sample import Sample


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def get_device(model: nn.Module) -> torch.device:
    """Return the device of the first parameter, where inputs go."""
    return next(model.parameters()).device


def sample_inputs(
    model: PreTrainedModel, samples: Sequence[Sample], load_images: LoadImages | None
) -> dict[str, torch.Tensor]:
    """
    Return the inputs of an ordinary forward over samples side by side, padded to the longest.

    `load_images` returns what the model reads of some images.
    """
    device = get_device(model)

    def padded(arrays: Iterable[NDArray[np.int64]]) -> torch.Tensor:
        return pad_sequence([torch.tensor(array, device=device) for array in arrays], batch_first=True)

    inputs = {"input_ids": padded(sample.token_ids for sample in samples)}
    if len(samples) > 1:
        inputs["attention_mask"] = padded(np.ones_like(sample.token_ids) for sample in samples)
    if all(sample.image_features is None for sample in samples):
        return inputs
    inputs["attention_mask"] = padded(np.ones_like(sample.token_ids) for sample in samples)
    # A sample of text alone stands beside those with images where all share a batch (`_auxiliary_loss`).
    is_image = padded(
        np.zeros_like(sample.token_ids) if own is None else (own >= 0).astype(np.int64)
        for sample in samples
        for own in [sample.image_features]
    )
    taken = inspect.signature(model.forward).parameters
    inputs |= {name: is_image for name in TOKEN_TYPES if name in taken}
    shown = [image for sample in samples for image in images_of(sample)]
    if shown:
        assert load_images is not None, "samples with images need a loader"
        inputs |= {name: value.to(device) for name, value in load_images(shown).items()}
    return inputs


def images_of(sample: Sample) -> list[ImageReference]:
    """Return the images that a sample shows, in the order in which they stand in it."""
    return shown_images(sample.image_features, sample.images)
