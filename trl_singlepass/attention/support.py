"""Which models tree attention can run: refusals, each by name and with its reason."""

from __future__ import annotations

import inspect
from typing import Any

from ..recurrent.families import decoder_of, recurrent_layers, unknown_mixing_layers
from .tree_mask import Tree


# Layer types of transformers that attend under a mask; layers of the last two mix tokens in another way as well.
ATTENTION_LAYER_TYPES = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "hybrid", "hybrid_sliding"}
)
_TOKENWISE_LAYER_TYPES = frozenset({"mlp", "moe", "dense", "sparse"})
# The layers themselves are found by what they do (see `recurrent_layers`).
_RECURRENT_LAYER_TYPES = frozenset(
    {
        "linear_attention",
        "conv",
        "mamba",
        "recurrent",
        "indexed_attention",
        "minimax_m3_sparse",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    }
)
_WAY_OUT = "Train this model on one sample per turn (N-pass) with TRL's SFTTrainer."


class UnsupportedModelError(ValueError):
    """A model whose layers would mix branches of a tree, or that tree attention cannot reach."""


def check_model(model: Any) -> None:
    """
    Refuse a model that one pass would train wrongly.

    Args:
        model (`transformers.PreTrainedModel`):
            Model without adapters or wrappers.

    Raises:
        `UnsupportedModelError`: If a layer mixes tokens in a way that is not known, attends to later tokens, or the
            model does not take its attention function, its mask or its positions from outside.
    """
    reason = _mixes_branches(model) or (_is_out_of_reach(model) if num_attention_layers(model) else None)
    if reason is not None:
        raise UnsupportedModelError(f"{type(model).__name__} {reason}. {_WAY_OUT}")


def _mixes_branches(model: Any) -> str | None:
    config = model.config.get_text_config()
    layer_types = list(getattr(config, "layer_types", None) or ())
    known = ATTENTION_LAYER_TYPES | _TOKENWISE_LAYER_TYPES | _RECURRENT_LAYER_TYPES
    if foreign := set(layer_types) - known:
        return f"has {_listed(foreign)} layers; how they mix tokens is not known, so a branch could see its siblings"
    if unknown := unknown_mixing_layers(model):
        return f"has {_listed(unknown)} layers; they mix neighbouring tokens, so a branch would see its siblings"
    recurrent = [layer_type for layer_type in layer_types if layer_type in _RECURRENT_LAYER_TYPES]
    stateful = getattr(model, "_is_stateful", False)
    if len(recurrent_layers(model)) < max(len(recurrent), int(stateful)):
        what = f"{_listed(set(recurrent))} layers" if recurrent else "a recurrent state"
        return f"has {what} that cannot be run from fork to fork; a branch would see its siblings through them"
    return None


def _is_out_of_reach(model: Any) -> str | None:
    modules = list(decoder_of(model).modules())
    if looking_ahead := {type(module).__name__ for module in modules if _looks_ahead(module)}:
        return f"attends to later tokens in {_listed(looking_ahead)}, which one pass would not"
    if numbering := [module for module in modules if hasattr(module, "create_position_ids_from_input_ids")]:
        return f"numbers positions from its padding token in {type(numbering[0]).__name__}, not from 0"
    if not model._can_set_attn_implementation():
        return (
            "does not take its attention function from transformers' AttentionInterface, so the tree cannot reach its "
            "layers"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "has a forward without position_ids, so tokens of a branch cannot be given their depth"
    return None


def _looks_ahead(module: Any) -> bool:
    """Whether a module is attention without causality; decoders may leave that to their mask."""
    return getattr(module, "is_causal", True) is False and not getattr(module, "is_decoder", False)


def check_every_layer_attended(model: Any, tree: Tree) -> None:
    """
    Check after a forward that every layer that mixes tokens received the tree.

    Args:
        model (`transformers.PreTrainedModel`):
            Model that ran.
        tree (`Tree`):
            Tree of the forward.

    Raises:
        `UnsupportedModelError`: If fewer layers than the model has received it.
    """
    expected = num_attention_layers(model) + len(recurrent_layers(model))
    if len(tree.attended_by) < expected:
        names = sorted({type(module).__name__ for module in tree.attended_by}) or ["none"]
        raise UnsupportedModelError(
            f"{type(model).__name__} has {expected} layers that mix tokens, but only {len(tree.attended_by)} received "
            f"the tree (modules: {', '.join(names)}). The others would mix branches. {_WAY_OUT}"
        )


def num_attention_layers(model: Any) -> int:
    """Return the number of layers of a model that attend under a mask."""
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return max(int(config.num_hidden_layers) - len(recurrent_layers(model)), 0)
    return sum(layer_type in ATTENTION_LAYER_TYPES for layer_type in layer_types)


def _listed(names: set[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))
