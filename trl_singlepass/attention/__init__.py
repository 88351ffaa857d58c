"""Tree attention: registered with transformers once, chosen by the model's own `attn_implementation`."""

from __future__ import annotations

from typing import Any

from ..recurrent.layer import use_tree_recurrence
from ..training.adapters import without_adapters
from ..training.model import UnsupportedModelError, check_every_layer_attended, check_model
from .registry import TREE_ATTENTION, tree_attention_name
from .tree_mask import Tree, TreeMask, tree_context


__all__ = [
    "TREE_ATTENTION",
    "Tree",
    "TreeMask",
    "UnsupportedModelError",
    "check_every_layer_attended",
    "check_model",
    "tree_context",
    "use_tree_attention",
]


def use_tree_attention(model: Any) -> str:
    """
    Switch a model to tree attention; batches without a tree run as before.

    Args:
        model (`transformers.PreTrainedModel`, `peft.PeftModel`):
            Model to switch, in place. Its `attn_implementation` chooses the backend.

    Returns:
        `str`: The `attn_implementation` that the model had.

    Raises:
        `UnsupportedModelError`: If one pass would train the model wrongly.
        `ValueError`: If there is no tree attention for its `attn_implementation`.
        `ImportError`: If the kernel it chose is not installed.
    """
    base = without_adapters(model)
    check_model(base)
    implementation = str(base.config.get_text_config()._attn_implementation)
    name = tree_attention_name(implementation)
    use_tree_recurrence(base)
    if name != implementation and base._can_set_attn_implementation():  # some models have recurrent layers only
        base.set_attn_implementation(name)
    return implementation
