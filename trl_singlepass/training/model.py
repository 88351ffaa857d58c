"""Enable trees in a model, or say why a single pass would train it incorrectly."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from accelerate.utils import is_compiled_module
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..attention.context import Tree
from ..attention.registry import tree_attention_name
from ..attention.text_layers import set_text_attention
from ..recurrent.layer import enable_tree_recurrence
from ..recurrent.layer_kinds import decoder_modules, get_decoder, path_dependent_layers, unknown_mixing_layers


if TYPE_CHECKING:
    from peft import PeftModel

Forward: TypeAlias = Callable[..., ModelOutput]
"""A model, or a function in its place: takes the inputs of the model by name, returns its outputs."""

# Layer types of transformers that attend under a mask; the last two also mix tokens in another way.
_ATTENTION_LAYER_TYPES = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "hybrid", "hybrid_sliding"}
)
_TOKENWISE_LAYER_TYPES = frozenset({"mlp", "moe", "dense", "sparse"})
# The layers themselves are found by what they do (see `path_dependent_layers`).
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
# Attention of each token to its own outputs of earlier layers: no token reads another.
_TOKENWISE_ATTENTION = frozenset(
    {
        "Inkling2BlockAttentionResidual",
        "Inkling2LoopBlockAttentionResidual",
        "Inkling2LoopMessageAttentionResidual",
    }
)
# What transformers' errors say where an input is missing without which a model does not train.
_DEMANDS = ("is required as a model input when training", "has to be not-None")
_WAY_OUT = "Train this model on one sample per turn (N-pass) with TRL's SFTTrainer."


class UnsupportedModelError(ValueError):
    """A model whose layers would mix branches of a tree, or that tree attention cannot reach."""


def check_model(model: PreTrainedModel) -> None:
    """
    Refuse a model that a single pass would train incorrectly.

    Args:
        model (`transformers.PreTrainedModel`):
            Model without adapters or wrappers.

    Raises:
        `UnsupportedModelError`: If a layer mixes tokens in an unknown way or attends to later tokens, or if the model
            does not take its attention function, mask and positions from outside, does not train on text, or is
            loaded in 8 bits.
    """
    if getattr(model, "is_loaded_in_8bit", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is loaded in 8 bits (load_in_8bit): LLM.int8() looks for outliers over all "
            "tokens of a forward pass, so the result of a turn would depend on what shares its row. Use load_in_4bit."
        )
    if reason := _trains_on_other_media(model):
        raise UnsupportedModelError(f"{type(model).__name__} {reason}. Load another model.")
    reason = _mixes_branches(model) or (None if _only_recurs(model) else _is_out_of_reach(model))
    if reason is not None:
        raise UnsupportedModelError(f"{type(model).__name__} {reason}. {_WAY_OUT}")


def check_not_compiled(model: object) -> None:
    """Refuse what `torch.compile(model)` returns: TRL gives it another forward, and the compiled one never runs."""
    if not isinstance(model, PreTrainedModel) and isinstance(model, nn.Module) and is_compiled_module(model):
        raise ValueError(
            "The model is compiled already (torch.compile(model)), and TRL's fused head would run in the place of the "
            "compiled forward. Pass the model itself with torch_compile=True, or compile it in place: model.compile()."
        )


def _mixes_branches(model: PreTrainedModel) -> str | None:
    if model.config.is_encoder_decoder:
        return "is an encoder-decoder: a prompt and its answer are not one sequence that branches could share"
    config = model.config.get_text_config()
    layer_types = list(getattr(config, "layer_types", None) or ())
    known = _ATTENTION_LAYER_TYPES | _TOKENWISE_LAYER_TYPES | _RECURRENT_LAYER_TYPES
    if foreign := set(layer_types) - known:
        return f"has {_listed(foreign)} layers; how they mix tokens is not known, so a branch could see its siblings"
    if unknown := unknown_mixing_layers(model):
        return f"has {_listed(unknown)} layers; they mix neighbouring tokens, so a branch would see its siblings"
    recurrent = [layer_type for layer_type in layer_types if layer_type in _RECURRENT_LAYER_TYPES]
    stateful = getattr(model, "_is_stateful", False)
    if len(path_dependent_layers(model)) < max(len(recurrent), int(stateful)):
        what = f"{_listed(set(recurrent))} layers" if recurrent else "a recurrent state"
        return f"has {what} that cannot be run from fork to fork; a branch would see its siblings through them"
    return None


def _only_recurs(model: PreTrainedModel) -> bool:
    """Return whether a model has no attention at all, and therefore no use for positions."""
    config = model.config.get_text_config()
    if set(getattr(config, "layer_types", None) or ()) & _ATTENTION_LAYER_TYPES:
        return False
    return not attention_layers(model) and len(path_dependent_layers(model)) >= config.num_hidden_layers


def _is_out_of_reach(model: PreTrainedModel) -> str | None:
    modules = list(decoder_modules(model))
    if looking_ahead := {type(module).__name__ for module in modules if _looks_ahead(module)}:
        return f"attends to later tokens in {_listed(looking_ahead)}, which one pass would not"
    if numbering := [module for module in modules if hasattr(module, "create_position_ids_from_input_ids")]:
        return f"numbers positions from its padding token in {type(numbering[0]).__name__}, not from 0"
    if not takes_attention_from_outside(model) or not (attention_layers(model) or path_dependent_layers(model)):
        return (
            "does not take its attention function from transformers' AttentionInterface, so the tree cannot reach its "
            "layers"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "has a forward without position_ids, so tokens of a branch cannot be given their depth"
    return None


def takes_attention_from_outside(model: PreTrainedModel) -> bool:
    """
    Return whether the layers that read tokens take their attention function from transformers' AttentionInterface.

    The encoder of images may have attention of its own (GOT-OCR 2).

    Args:
        model (`transformers.PreTrainedModel`):
            Model.
    """
    decoder = get_decoder(model)
    reader = decoder if isinstance(decoder, PreTrainedModel) else model
    return bool(reader._can_set_attn_implementation())


def _trains_on_other_media(model: PreTrainedModel) -> str | None:
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    vocab_size = getattr(config, "vocab_size", 0)
    if unpadded := getattr(config, "unpadded_vocab_size", None):  # Inkling 2 pads the embedding, not the head
        vocab_size = unpadded
    if head is None:
        return "names no head over the tokens that it reads (`get_output_embeddings`), so their loss is out of reach"
    # Not the size of its weight, which is empty under ZeRO-3.
    if getattr(head, "out_features", vocab_size) < vocab_size:
        return "has no head over the tokens that it reads, so it does not generate text"
    if demand := next(filter(None, map(_demand_in_training, model.modules())), None):
        return f"does not train on text alone: {demand!r}"
    return None


def _demand_in_training(module: nn.Module) -> str | None:
    """Return the error that a module raises in training without an input that rows of text do not have."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    texts = [text for text in code.co_consts if isinstance(text, str)] if code is not None else []
    return next((text for text in texts if any(demand in text for demand in _DEMANDS)), None)


def _looks_ahead(module: nn.Module) -> bool:
    """Return whether a module is attention that is not causal; decoders may leave that to their mask."""
    looks_ahead = getattr(module, "is_causal", True) is False and not getattr(module, "is_decoder", False)
    return looks_ahead and type(module).__name__ not in _TOKENWISE_ATTENTION


def check_every_layer_attended(model: PreTrainedModel, tree: Tree) -> None:
    """
    Check after a forward pass that every layer that mixes tokens received the tree.

    Args:
        model (`transformers.PreTrainedModel`):
            Model that ran.
        tree (`Tree`):
            Tree of the forward.

    Raises:
        `UnsupportedModelError`: If a layer did not receive it.
    """
    layers = [*attention_layers(model), *path_dependent_layers(model)]
    missed = {type(layer).__name__ for layer in layers if layer not in tree.attended_by}
    if missed or not layers:
        which = f"did not receive the tree in {_listed(missed)}" if missed else "has no layers that received the tree"
        raise UnsupportedModelError(f"{type(model).__name__} {which}, so branches would be mixed. {_WAY_OUT}")


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers that take their attention function from transformers, except those that run on whole paths."""
    layers: list[nn.Module] = []
    on_whole_paths = {part for layer in path_dependent_layers(model) for part in layer.modules()}
    for module in decoder_modules(model):
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        reads_interface = code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
        # Cross attention reads an encoder, and runs only where there is one.
        is_elsewhere = "Cross" in type(module).__name__ or type(module).__name__ in _TOKENWISE_ATTENTION
        if reads_interface and module not in on_whole_paths and not is_elsewhere:
            layers.append(module)
    return layers


def _listed(names: set[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def enable_tree(model: PreTrainedModel | PeftModel) -> str:
    """
    Make a model run on trees where there is one; batches without a tree run as before.

    Args:
        model (`transformers.PreTrainedModel`, `peft.PeftModel`):
            Model, changed in place. Its `attn_implementation` chooses the attention backend.

    Returns:
        `str`: The `attn_implementation` that the model had.

    Raises:
        `UnsupportedModelError`: If a single pass would train the model incorrectly.
        `ValueError`: If there is no tree attention for its `attn_implementation`, or it is compiled.
        `ImportError`: If the kernel it chose is not installed.
    """
    check_not_compiled(model)
    base = without_adapters(model)
    check_model(base)
    implementation = str(base.config.get_text_config()._attn_implementation)
    name = tree_attention_name(implementation)
    enable_tree_recurrence(base)
    if name != implementation and takes_attention_from_outside(base):  # some models have recurrent layers only
        set_text_attention(base, name)
    return implementation


def without_adapters(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """
    Return the model inside a PEFT wrapper, or the model itself if it has no adapters.

    Args:
        model (`transformers.PreTrainedModel`, `peft.PeftModel`):
            Model.

    Returns:
        `transformers.PreTrainedModel`: The base model.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model
