"""Tree attention by `attn_implementation`: its registration with transformers, and the switch of a model to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask, flash_attention_mask, flex_attention_mask, sdpa_mask

from .flash import varlen_forward
from .flex import flex_forward
from .interface import AttentionFunction
from .kernel_choice import DeviceTraits, TorchKernel, choose_torch_kernel
from .mask_rules import MaskRule, RuleKind
from .sdpa import sdpa_forward
from .tree_mask import tree_mask_or
from .varlen_kernels import flash_kernel


# The registered names avoid "sdpa", "flash", "flex_attention" and "/", which have a meaning to transformers.
TREE_ATTENTION = {
    "sdpa": "tree_torch",
    "eager": "tree_eager",  # the same kernels: on ordinary batches, eager layers read masks that are added to scores
    "flex_attention": "tree_flex",
    "flash_attention_2": "tree_varlen_2",
    "flash_attention_3": "tree_varlen_3",
    "torch_varlen": "tree_varlen_torch",
}
"""For each `attn_implementation`, the registered name of its tree attention; Hub kernels join on first use."""
KEEPS_ATTENTION = "_keeps_attention"
"""Attribute of the configuration of a layer that keeps its attention when that of the model changes."""
_RULES = {"full_attention": RuleKind.CAUSAL, "sliding_attention": RuleKind.WINDOW, "chunked_attention": RuleKind.CHUNK}


def tree_attention_name(implementation: str) -> str:
    """
    Return the registered name of the tree attention of an `attn_implementation`, which may be such a name already.

    Raises `ValueError` if there is no tree attention for it, `ImportError` if its kernel is not installed.
    """
    if _is_hub_kernel(implementation) and implementation not in TREE_ATTENTION:
        flash_kernel(implementation)  # raises before a name exists for it
        TREE_ATTENTION[implementation] = "tree_varlen_" + re.sub(r"\W+|flash", "_", implementation.lower())
        _register_varlen(implementation)
    implementation = _stands_for().get(implementation, implementation)
    if implementation not in TREE_ATTENTION:
        raise ValueError(
            f"There is no tree attention for attn_implementation={implementation!r}. Load the model with one of "
            f"{', '.join(repr(name) for name in TREE_ATTENTION)}, or a flash kernel of the Hub."
        )
    if TREE_ATTENTION[implementation].startswith("tree_varlen"):
        flash_kernel(implementation)
    return TREE_ATTENTION[implementation]


def describe_tree_attention(
    implementation: str, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> str:
    """
    Say in one sentence on which kernel a model's attention runs on trees, and why.

    `config` is the model's text configuration, `dtype` the one that its attention computes in.
    """
    if TREE_ATTENTION.get(implementation) == "tree_flex":
        return "one compiled FlexAttention kernel for every rule, with a block mask made from the tree"
    if implementation in ("sdpa", "eager"):
        return _describe_torch_kernels(config, device, dtype)
    source = "PyTorch" if implementation == "torch_varlen" else implementation
    return f"the flash varlen kernel of {source}, one call for all branches, in half precision only"


def _describe_torch_kernels(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    traits = DeviceTraits.from_device(device)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    has_softcap = getattr(config, "attn_logit_softcapping", None) is not None
    kernels: dict[TorchKernel, list[str]] = {}
    for layer_type in dict.fromkeys(getattr(config, "layer_types", None) or ["full_attention"]):
        if layer_type in _RULES:
            kernel = choose_torch_kernel(
                traits, dtype, head_dim, MaskRule(_RULES[layer_type]), has_softcap=has_softcap
            )
            kernels.setdefault(kernel, []).append(layer_type)
    parts = [f"{kernel.value} for {' and '.join(layers)}" for kernel, layers in kernels.items()]
    why_not = traits.why_no_varlen()
    reason = "" if why_not is None else f"; not PyTorch's varlen kernel, because {why_not}"
    return f"the fastest of PyTorch's own kernels that computes a layer in {dtype}: {', '.join(parts)}{reason}"


def _is_hub_kernel(implementation: str) -> bool:
    return "/" in implementation and "flash" in implementation and "|" not in implementation


def _register(name: str, attention: AttentionFunction, plain_mask: Callable[..., Any]) -> None:
    # Kept out of the graphs of a compiled model (`torch_compile=True`): dynamo would specialise them on the tree of
    # the first batch.
    AttentionInterface.register(name, torch.compiler.disable(attention))  # type: ignore[no-untyped-call]
    mask: Any = torch.compiler.disable(tree_mask_or(plain_mask))  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(name, mask)


def _register_varlen(implementation: str) -> None:
    plain_mask = sdpa_mask if implementation == "torch_varlen" else flash_attention_mask
    _register(TREE_ATTENTION[implementation], varlen_forward(implementation), plain_mask)


def set_text_attention(model: Any, implementation: str) -> None:
    """
    Change the attention implementation of a model in place, but not of its encoders for other media.

    These run on images, not on the row: they keep the kernel that they were loaded with.
    """
    text = model.config.get_text_config()
    model.set_attn_implementation(_down_to(text, model.config, implementation) or implementation)
    for module in model.modules():  # layers that PEFT replicates have a configuration of their own
        config: Any = getattr(module, "config", None)
        is_copy = type(config) is type(text) and config is not text and not isinstance(module, PreTrainedModel)
        if is_copy and not getattr(config, KEEPS_ATTENTION, False):
            config._attn_implementation = text._attn_implementation


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """
    Show the code of a model its own `attn_implementation`, for calls without a tree: some of it compares the name.

    Layers that gradient checkpointing runs again during backward see it then as well.
    """
    own = _stands_for()
    renamed = [(config, name) for config in _configs(model) if (name := config._attn_implementation) in own]
    layers = [layer for layer in model.modules() if "_gradient_checkpointing_func" in vars(layer)]
    with ExitStack() as undo:
        for config, name in renamed:
            config._attn_implementation = {"": own[name]}  # not those of its parts
            undo.callback(setattr, config, "_attn_implementation", {"": name})
        for layer in layers:
            checkpoint = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = partial(_checkpoint_with_own_attention, model, checkpoint)
            undo.callback(setattr, layer, "_gradient_checkpointing_func", checkpoint)
        yield


def _checkpoint_with_own_attention(model: PreTrainedModel, checkpoint: Any, function: Any, *args: Any) -> Any:
    return checkpoint(own_attention(model)(function), *args)


def _configs(model: PreTrainedModel) -> list[Any]:
    """Configurations of a model, of its parts, and of layers that have one of their own, each once."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values())


def _stands_for() -> dict[str, str]:
    return {name: known for known, name in TREE_ATTENTION.items()}


def _down_to(text: Any, config: Any, implementation: str) -> str | dict[str, Any] | None:
    """A name for the text configuration and those that contain it, by part; `None` for a part without text."""
    if config is text:
        return implementation
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    named = {name: _down_to(text, part, implementation) for name, part in parts.items() if part is not None}
    with_text = {name: part for name, part in named.items() if part is not None}
    return {"": implementation, **with_text} if with_text else None


_register("tree_torch", sdpa_forward, sdpa_mask)
_register("tree_eager", sdpa_forward, eager_mask)
_register("tree_flex", flex_forward, flex_attention_mask)
for _implementation in ("flash_attention_2", "flash_attention_3", "torch_varlen"):
    _register_varlen(_implementation)
# transformers has no name for PyTorch's varlen kernel; with this one, a model loads with it.
_register("torch_varlen", varlen_forward("torch_varlen"), sdpa_mask)
