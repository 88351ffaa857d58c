"""
Layers that ZeRO-3 has to gather as a whole.

ZeRO-3 gathers the parameters of a module on all ranks at once each time the module runs. How often the parts of some
layers run depends on the data: those of a recurrent layer once per piece of the rank's own row, those of experts (in
transformers' "eager" implementation) once per expert that gets a token. Ranks would wait for each other forever, or
mix up parameters. Such a layer is therefore a leaf: its parameters are gathered together when it begins.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..engine.enable import without_adapters
from ..recurrent.introspection import path_dependent_layers
from ..recurrent.layer import runs_on_trees


if TYPE_CHECKING:
    from peft import PeftModel


def make_leaves(model: PreTrainedModel | PeftModel, accelerator: Accelerator) -> None:
    """
    Let ZeRO-3 gather recurrent layers and experts as a whole. Other engines are left alone.

    Takes the model before DeepSpeed does.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage < 3:
        return
    from deepspeed.utils import set_z3_leaf_module

    for layer in _leaves(without_adapters(model)):
        set_z3_leaf_module(layer, True)
        layer.register_forward_pre_hook(_pass_differentiable_input, with_kwargs=True)


def _leaves(model: PreTrainedModel) -> Iterator[nn.Module]:
    yield from path_dependent_layers(model)
    for module in model.modules():
        code = getattr(type(module).forward, "__code__", None)
        names = set() if code is None else set(code.co_names)
        # A forward that transformers wraps to choose an implementation, or a loop over the experts that got a token.
        is_loop = "nonzero" in names and next(module.parameters(recurse=False), None) is not None
        if "_experts_implementation" in names or is_loop:
            yield module


def _pass_differentiable_input(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """
    Pass a layer's first argument, its hidden states, by position, and let them require gradients.

    DeepSpeed reduces the gradients of a leaf once those of its arguments by position are there. Without any, it does
    so before the gradients exist, and they are lost (0.19). To see them, autograd replaces tensors that come by
    position, and the replacement of a mask has no tree; so a layer that runs on trees gets the others by name.
    """
    _, first, *names = inspect.signature(type(layer).forward).parameters  # after `self`
    hidden_states, *others = (kwargs.pop(first), *args) if first in kwargs else args
    if runs_on_trees(layer):
        kwargs, others = {**dict(zip(names, others, strict=False)), **kwargs}, []
    if torch.is_grad_enabled() and not hidden_states.requires_grad:  # after a frozen embedding
        hidden_states = hidden_states.detach().requires_grad_()
    return (hidden_states, *others), kwargs
