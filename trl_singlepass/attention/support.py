"""Which models tree attention can run: refusals, each by name and with its reason."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .tree_mask import Tree


# Layer types of transformers whose only mixing of tokens is attention under a mask, or no mixing at all.
ATTENTION_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_TOKENWISE_LAYER_TYPES = frozenset({"mlp", "moe", "dense", "sparse"})
# A mask reaches none of these: they mix neighbouring tokens of the row, siblings included.
_MIXING_MODULES = (nn.Conv1d, nn.RNNBase)


class UnsupportedModelError(ValueError):
    """A model whose layers would mix branches of a tree, or that tree attention cannot reach."""


def check_model(model: Any) -> None:
    """
    Refuse a model that one pass would train wrongly.

    Args:
        model (`transformers.PreTrainedModel`):
            Model without adapters or wrappers.

    Raises:
        `UnsupportedModelError`: If a layer mixes tokens outside attention, or the model does not take its attention
            function, its mask or its positions from outside.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    foreign = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYER_TYPES - _TOKENWISE_LAYER_TYPES
    if foreign:
        raise UnsupportedModelError(
            f"{name} has {_listed(foreign)} layers; they mix tokens outside attention, so a branch would see its "
            f"siblings. {_WAY_OUT}"
        )
    mixing = {type(module).__name__ for module in model.modules() if isinstance(module, _MIXING_MODULES)}
    if mixing or getattr(model, "_is_stateful", False):
        what = f"{_listed(mixing)} modules" if mixing else "a recurrent state"
        raise UnsupportedModelError(f"{name} has {what}; a branch would see its siblings through them. {_WAY_OUT}")
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{name} does not take its attention function from transformers' AttentionInterface, so the tree cannot "
            f"reach its layers. {_WAY_OUT}"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{name}.forward takes no position_ids, so tokens of a branch cannot be given their depth. {_WAY_OUT}"
        )


_WAY_OUT = "Train this model on one sample per turn (N-pass) with TRL's SFTTrainer."


def check_every_layer_attended(model: Any, tree: Tree) -> None:
    """
    Check after a forward that every attention layer received the tree.

    Args:
        model (`transformers.PreTrainedModel`):
            Model that ran.
        tree (`Tree`):
            Tree of the forward.

    Raises:
        `UnsupportedModelError`: If fewer attention layers than the config announces received it.
    """
    expected = num_attention_layers(model.config.get_text_config())
    if len(tree.attended_by) < expected:
        names = sorted({type(module).__name__ for module in tree.attended_by}) or ["none"]
        raise UnsupportedModelError(
            f"{type(model).__name__} has {expected} attention layers, but only {len(tree.attended_by)} received the "
            f"tree (modules: {', '.join(names)}). The others would attend across branches. {_WAY_OUT}"
        )


def num_attention_layers(config: Any) -> int:
    """Return the number of layers that attend, from a text config of transformers."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return int(config.num_hidden_layers)
    return sum(layer_type in ATTENTION_LAYER_TYPES for layer_type in layer_types)


def _listed(names: set[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))
