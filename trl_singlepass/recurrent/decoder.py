"""The part of a model that reads tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel


# Parts of a model's configuration that describe its encoders of other media.
ENCODER_CONFIGS = ("vision_config", "audio_config")


def get_decoder(model: PreTrainedModel) -> nn.Module:
    """Return the part of a model that reads tokens, without the encoders of other modalities."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    # Some models call their head a decoder.
    if isinstance(decoder, nn.Module) and model.get_input_embeddings() in set(decoder.modules()):
        return decoder
    whole: nn.Module = model
    return whole


def decoder_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Yield the modules that read tokens: the decoder's, without encoders of other media that it holds (GIT)."""
    configs = {name: getattr(model.config, name, None) for name in model.config.sub_configs if name in ENCODER_CONFIGS}
    encoders = tuple(type(config) for config in configs.values() if config is not None)
    yield from dict.fromkeys(_without_encoders(get_decoder(model), encoders))  # layers may share a module


def _without_encoders(module: nn.Module, encoders: tuple[type, ...]) -> Iterator[nn.Module]:
    yield module
    for child in module.children():
        if not isinstance(getattr(child, "config", None), encoders):
            yield from _without_encoders(child, encoders)


def takes_attention_from_outside(model: PreTrainedModel) -> bool:
    """Return whether layers that read tokens (not the encoder of images) take attention from AttentionInterface."""
    decoder = get_decoder(model)
    reader = decoder if isinstance(decoder, PreTrainedModel) else model
    return bool(reader._can_set_attn_implementation())


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout and gradient checkpointing; each module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
