"""
What engines that shard a model must be told about its layers: ZeRO-3, FSDP2 and tensor parallelism.

ZeRO-3 gathers the parameters of a module on all ranks at once each time the module runs. How often the parts of some
layers run depends on the data: those of a recurrent layer once per piece of the rank's own row, those of experts (in
transformers' "eager" implementation) once per expert that gets a token. Ranks would wait for each other forever, or
mix up parameters. Such a layer is therefore a leaf: its parameters are gathered together when it begins.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, logging

from ..engine.borrowed_state import are_zero3
from ..engine.enable import without_adapters
from ..recurrent.layer import runs_on_trees
from ..recurrent.measurement import path_dependent_layers


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)

PREFETCHED = "stage3_prefetch_bucket_size"  # of ZeRO-3
_ADDED_UP = "replicated_with_grad_allreduce"  # of transformers' plans for tensor parallelism


def prepare_sharding(model: PreTrainedModel | PeftModel, accelerator: Accelerator, tp_size: int = 1) -> None:
    """Choose what ZeRO-3 gathers and FSDP2 shards as a whole, before the engine takes the model; correct tp_size."""
    make_leaves(model, accelerator)
    _leave_out_absent_layers(without_adapters(model), accelerator)
    if tp_size > 1:
        sum_gradients_once(without_adapters(model))


# ZeRO-3 --------------------------------------------------------------------------------------------------------------


def make_leaves(model: PreTrainedModel | PeftModel, accelerator: Accelerator) -> None:
    """Let ZeRO-3 gather recurrent layers and experts as a whole."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage < 3:
        return
    from deepspeed.utils import set_z3_leaf_module

    leaves = list(path_dependent_layers(without_adapters(model)))
    for module in without_adapters(model).modules():
        code = getattr(type(module).forward, "__code__", None)
        names = set() if code is None else set(code.co_names)
        # A forward that transformers wraps to choose an implementation, or a loop over the experts that got a token.
        is_loop = "nonzero" in names and next(module.parameters(recurse=False), None) is not None
        leaves += [module] if "_experts_implementation" in names or is_loop else []
    for layer in leaves:
        set_z3_leaf_module(layer, True)
        layer.register_forward_pre_hook(_pass_differentiable_input, with_kwargs=True)


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


def stop_prefetching(accelerator: Accelerator) -> None:
    """Turn off ZeRO-3's default of prefetching: it frees parameters that a backward in another order needs (0.19)."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return
    settings = plugin.deepspeed_config["zero_optimization"]
    if settings.get(PREFETCHED, "auto") == "auto":
        settings[PREFETCHED] = 0
        logger.info(f"{PREFETCHED} is 0: where a row runs in parts, ZeRO-3 cannot fetch parameters ahead.")


# FSDP2 ---------------------------------------------------------------------------------------------------------------


def _leave_out_absent_layers(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """
    Let FSDP2 shard the layers that the model has, where nobody has named others.

    transformers 5.24 also names those of an encoder that is not there (Qwen3.5), at which accelerate 1.15 stops.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.transformer_cls_names_to_wrap is not None:
        return
    present = {type(module).__name__ for module in model.modules()}
    named = set(model._no_split_modules or ())
    if named & present:
        plugin.transformer_cls_names_to_wrap = sorted(named & present)


def gather_head_with_model(model: PreTrainedModel | PeftModel) -> None:
    """
    Gather a head that ZeRO-3 or FSDP2 shards on its own whenever the model runs; with other engines, do nothing.

    Both gather a module when it is called, but TRL's fused head reads the weight without calling the head. Where
    ZeRO-3 has to gather the weight for that, it gathers it in the backward pass too; where an earlier run called
    the head, it has fetched the weight ahead, and does not (0.19). With FSDP2, the copy that TRL gathers only
    collects the gradient of the rank's own tokens. accelerate avoids this where it finds the last normalisation,
    and shards the head together with it; in models with encoders it finds none.
    """
    head = without_adapters(model).get_output_embeddings()
    # What the fused head reads: of a head that an adapter trains beside its own (`modules_to_save`), its copy.
    read = [x for x in (getattr(head, "weight", None), getattr(head, "bias", None)) if x is not None]
    if are_zero3(read):
        import deepspeed

        for parameter in read:
            deepspeed.zero.register_external_parameter(without_adapters(model), parameter)
        return
    if not hasattr(head, "unshard"):
        return

    def gather(*_: object) -> None:
        head.unshard()

    def release(*_: object) -> None:
        if not torch.is_grad_enabled():  # otherwise, the backward pass releases it
            head.reshard()

    model.register_forward_pre_hook(gather)
    model.register_forward_hook(release)


# Tensor parallelism --------------------------------------------------------------------------------------------------


def sum_gradients_once(model: PreTrainedModel) -> None:
    """
    Let ranks add up the gradients of normalised queries and keys once per batch, also if several are accumulated.

    Each rank normalises its own heads, so transformers adds up the gradients of these weights over ranks after each
    batch. What earlier batches have left in them has been added up already, and would be again (5.24). With two ranks
    whose gradients are 1 and 2 in a first batch, and 3 and 4 in a second one:

        transformers    3, then (3 + 3) + (3 + 4) = 13
        here            3, then  3      + (3 + 4) = 10

    Models whose layers ranks do not share are left alone.
    """
    plan = getattr(model, "tp_plan", None) or {}
    for name, module in model.named_modules():
        if plan.get(name) == _ADDED_UP or plan.get(re.sub(r"(?<=\.)\d+(?=\.)", "*", name)) == _ADDED_UP:
            _Once(module)


class _Once:
    """Sets earlier gradients of a module's parameters aside while that of a batch is added up over ranks."""

    def __init__(self, module: nn.Module) -> None:
        self._known: dict[str, nn.Parameter] = {}
        module.register_forward_hook(self._watch)

    def _watch(self, module: nn.Module, *_: object) -> None:
        """Register hooks behind those of transformers, which come with the first forward pass."""
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and torch.is_grad_enabled() and self._known.get(name) is not parameter:
                self._known[name] = parameter
                _add_after_the_sum(parameter)


def _add_after_the_sum(parameter: nn.Parameter) -> None:
    earlier: list[torch.Tensor | None] = []

    def set_aside(_: torch.Tensor) -> None:
        earlier.append(parameter.grad)
        parameter.grad = None

    def add(parameter: torch.Tensor) -> None:
        before = earlier.pop()
        if before is not None and parameter.grad is not None:
            parameter.grad += before

    parameter.register_hook(set_aside)  # type: ignore[no-untyped-call]
    parameter.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]
