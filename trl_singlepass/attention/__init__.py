"""Tree attention: registered with transformers once, chosen by the model's own `attn_implementation`."""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .sdpa import sdpa_forward
from .support import UnsupportedModelError, check_every_layer_attended, check_model
from .tree_mask import Tree, TreeMask, tree_context, tree_mask_or


__all__ = [
    "Tree",
    "TreeMask",
    "UnsupportedModelError",
    "check_every_layer_attended",
    "check_model",
    "tree_context",
    "use_tree_attention",
]

# The registered names avoid "sdpa", "flash", "flex_attention" and "/", in which transformers reads a meaning.
TREE_ATTENTION = {"sdpa": "tree_torch", "eager": "tree_torch"}
"""For each `attn_implementation` of transformers, the registered name of its tree attention."""

AttentionInterface.register("tree_torch", sdpa_forward)
AttentionMaskInterface.register("tree_torch", tree_mask_or(sdpa_mask))


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
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_model(base)
    implementation = str(base.config.get_text_config()._attn_implementation)
    if implementation in TREE_ATTENTION.values():
        return implementation
    if implementation not in TREE_ATTENTION:
        raise ValueError(
            f"There is no tree attention for attn_implementation={implementation!r}. Load the model with one of "
            f"{', '.join(repr(name) for name in TREE_ATTENTION)}."
        )
    base.set_attn_implementation(TREE_ATTENTION[implementation])
    return implementation
