"""The first layers of a model: as many as fit beside their gradients."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import psutil
import torch
from transformers import AutoModelForCausalLM

from ...cost.memory import ActivationBytes


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# `verify` in float32: the weights, a second copy of them and three sets of gradients.
BYTES_PER_PARAMETER = 5 * 4
SHARE_OF_FREE_MEMORY = 0.7
MOST_LAYERS_ON_CPU = 4


def slice_config(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """Return the configuration of a model's first layers. Of a multimodal model, the text part is taken."""
    text = copy.deepcopy(config.get_text_config())
    total = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == total:  # one entry per layer: layer_types and the like
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers
    return text


def layers_that_fit(config: PreTrainedConfig, num_tokens: int, device: torch.device) -> int:
    """
    Return how many of a model's first layers can be verified in float32 and timed on a device.

    `num_tokens` is the length of the longest row that is timed. If not even the smallest slice fits, this raises
    `ValueError`.
    """
    text = config.get_text_config()
    total = int(text.num_hidden_layers)
    smallest = _layers_of_every_kind(text)
    most = total if device.type == "cuda" else min(total, max(smallest, MOST_LAYERS_ON_CPU))
    free = SHARE_OF_FREE_MEMORY * _free_bytes(device)
    for num_layers in range(most, smallest - 1, -1):
        if _bytes_of_slice(slice_config(text, num_layers), num_tokens) <= free:
            return num_layers
    raise ValueError(
        f"Not even the first {smallest} of {total} layers fit: they need "
        f"{_bytes_of_slice(slice_config(text, smallest), num_tokens) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are "
        "free. Close other programs, or name a smaller model."
    )


def _layers_of_every_kind(text: PreTrainedConfig) -> int:
    """How many of the first layers hold one of each type."""
    types = list(getattr(text, "layer_types", None) or ())
    return max((types.index(kind) + 1 for kind in set(types)), default=1)


def _bytes_of_slice(text: PreTrainedConfig, num_tokens: int) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    activations = ActivationBytes.from_config(text, 4, checkpointing=True).per_token
    return int(BYTES_PER_PARAMETER * parameters + activations * num_tokens)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
