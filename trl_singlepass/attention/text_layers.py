"""The attention implementation of a model's language layers, which alone read the tree."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


KEEPS_ATTENTION = "_keeps_attention"
"""Attribute of the configuration of a layer that keeps its attention when that of the model changes."""


def set_text_attention(model: Any, implementation: str) -> None:
    """
    Change the attention implementation of a model in place, but not of its encoders for other media.

    An encoder of images runs on images, not on the row: it keeps the kernel that it was loaded with.
    """
    text = model.config.get_text_config()
    model.set_attn_implementation(_down_to(text, model.config, implementation) or implementation)
    for module in model.modules():  # layers that PEFT replicates have a configuration of their own
        config: Any = getattr(module, "config", None)
        is_copy = type(config) is type(text) and config is not text and not isinstance(module, PreTrainedModel)
        if is_copy and not getattr(config, KEEPS_ATTENTION, False):
            config._attn_implementation = text._attn_implementation


def _down_to(text: Any, config: Any, implementation: str) -> str | dict[str, Any] | None:
    """A name for the text configuration and those that contain it, by part; `None` for a part without text."""
    if config is text:
        return implementation
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    named = {name: _down_to(text, part, implementation) for name, part in parts.items() if part is not None}
    with_text = {name: part for name, part in named.items() if part is not None}
    return {"": implementation, **with_text} if with_text else None
