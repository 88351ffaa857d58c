"""Enable trees in a model, or say why a single pass would train it incorrectly."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from accelerate.utils import is_compiled_module
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..attention.registry import set_text_attention, tree_attention_name
from ..attention.rope import follow_samples, rope_types
from ..data.collator import DataCollatorForSinglePass
from ..images.loading import image_loader_of
from ..images.reading import ImageReader
from ..recurrent.decoder import takes_attention_from_outside
from ..recurrent.measurement import disable_tree_recurrence, enable_tree_recurrence, path_dependent_layers
from .model_call import expect_layers, leave_trees, take_trees


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import ProcessorMixin

Forward: TypeAlias = Callable[..., ModelOutput]
"""A model, or a function in its place: takes the inputs of the model by name, returns its outputs."""

# What transformers' errors say where an input is missing without which a model does not train.
_DEMANDS = ("is required as a model input when training", "has to be not-None")


class UnsupportedModelError(ValueError):
    """A model whose layers would mix branches of a tree, or that tree attention cannot reach."""


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model that no tree can reach, or that does not train on text; whether one is exact, is measured."""
    if getattr(model, "is_loaded_in_8bit", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is loaded in 8 bits (load_in_8bit): LLM.int8() looks for outliers over all "
            "tokens of a forward pass, so the result of a turn would depend on what shares its row. Use load_in_4bit."
        )
    if reason := _trains_on_other_media(model):
        raise UnsupportedModelError(f"{type(model).__name__} {reason}. Load another model.")
    reason = None
    if any("dynamic" in kind for module in model.modules() for kind in rope_types(module)):
        reason = (
            "has a dynamic RoPE (rope_type='dynamic'), whose base depends on the longest row that the process has "
            "seen, so that not even separate samples compute the same twice"
        )
    elif model.config.is_encoder_decoder:
        reason = "is an encoder-decoder: a prompt and its answer are not one sequence that branches could share"
    elif not takes_attention_from_outside(model) and not path_dependent_layers(model):
        reason = (
            "does not take its attention function from transformers' AttentionInterface, so the tree cannot reach its "
            "layers"
        )
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} {reason}. Train this model on one sample per turn (N-pass) with TRL's SFTTrainer."
        )


def check_not_compiled(model: object) -> None:
    """Refuse what `torch.compile(model)` returns: TRL gives it another forward, and the compiled one never runs."""
    if not isinstance(model, PreTrainedModel) and isinstance(model, nn.Module) and is_compiled_module(model):
        raise ValueError(
            "The model is compiled already (torch.compile(model)), and TRL's fused head would run in the place of the "
            "compiled forward. Pass the model itself with torch_compile=True, or compile it in place: model.compile()."
        )


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
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        for text in () if code is None else code.co_consts:
            if isinstance(text, str) and any(demand in text for demand in _DEMANDS):
                return f"does not train on text alone: {text!r}"
    return None


def enable_tree(model: PreTrainedModel | PeftModel) -> str:
    """
    Make a model run on trees where there is one: what `trl_singlepass.enable_tree` does, without measuring.

    Args:
        model (`transformers.PreTrainedModel`, `peft.PeftModel`):
            Model, changed in place. Its `attn_implementation` chooses the attention backend.

    Returns:
        `str`: The `attn_implementation` that the model had.

    Raises:
        `UnsupportedModelError`: If no tree can reach the model (see [`check_model`]).
        `ValueError`: If there is no tree attention for its `attn_implementation`, or it is compiled.
        `ImportError`: If the kernel it chose is not installed.
    """
    check_not_compiled(model)
    base = without_adapters(model)
    check_model(base)
    implementation = str(base.config.get_text_config()._attn_implementation)
    name = tree_attention_name(implementation)
    _name_parts(base)
    enable_tree_recurrence(base)
    if name != implementation and takes_attention_from_outside(base):  # some models have recurrent layers only
        set_text_attention(base, name)
    take_trees(base)
    if "_rope_handles" not in vars(base):
        base._rope_handles = follow_samples(base)
    # Layers that select tokens run over whole paths, without tree attention.
    expect_layers(base, int(takes_attention_from_outside(base) and not path_dependent_layers(base)))
    return implementation


def _name_parts(model: PreTrainedModel) -> None:
    """Let TRL's fused head find the decoder of Llama 4's text model, and the number of experts of PhiMoE."""
    config = model.config.get_text_config()
    decoders = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if model.base_model is model and len(decoders) == 1:
        model.base_model_prefix = decoders[0]
    if not hasattr(config, "num_experts") and hasattr(config, "num_local_experts"):
        config.num_experts = config.num_local_experts


def enable_images(
    model: PreTrainedModel | PeftModel, collator: DataCollatorForSinglePass, processor: ProcessorMixin | None = None
) -> None:
    """
    Make a model and a collator read rows with images.

    Args:
        model (`transformers.PreTrainedModel`, `peft.PeftModel`):
            Model, changed in place.
        collator (`DataCollatorForSinglePass`):
            Collator of the rows, changed in place.
        processor (`transformers.ProcessorMixin`, *optional*):
            Processor that the rows were prepared with; needed if the collator has no `load_images`.

    Raises:
        `UnsupportedImagesError`: If the model reads images in a way that a tree cannot give it.
    """
    collator.image_reader = ImageReader.enable(without_adapters(model))
    if collator.load_images is None and processor is not None:
        collator.load_images = image_loader_of(processor)


def disable_tree(model: PreTrainedModel | PeftModel, implementation: str) -> None:
    """Undo [`enable_tree`]; the model gets back the `attn_implementation` that it had."""
    base = without_adapters(model)
    leave_trees(base)
    for handle in vars(base).pop("_rope_handles", ()):
        handle.remove()
    disable_tree_recurrence(base)
    if takes_attention_from_outside(base):  # models with recurrent layers only do not
        set_text_attention(base, implementation)


def without_adapters(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the model inside a PEFT wrapper, or the model itself if it has no adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
