"""Contexts that change a model for a measurement, and give it back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..recurrent.decoder import get_decoder
from .enable import without_adapters


_ZERO_FILL = 0.02  # standard deviation of what takes the place of parameters that start at zero


@contextmanager
def in_training_mode(model: nn.Module) -> Iterator[None]:
    """Run a model as it trains, but without dropout or other noise; modes and buffers come back."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    noise = {
        module: {
            name: value for name, value in vars(module).items() if isinstance(value, float) and _is_noise(module, name)
        }
        for module in modes
    }
    model.train()
    try:
        with ExitStack() as stack:
            for module, values in noise.items():
                stack.enter_context(attributes(module, **dict.fromkeys(values, 0.0)))
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _is_noise(module: nn.Module, name: str) -> bool:
    """Whether an attribute is a probability with which a module drops units, or the size of its noise."""
    return "drop" in name or "jitter" in name or (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd))


@contextmanager
def adapters_disabled(model: Any) -> Iterator[None]:
    """Run a `PeftModel` without its adapters, and leave frozen what was frozen of them: PEFT would train it."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, is_trained in trained.items():
            parameter.requires_grad_(is_trained)


@contextmanager
def zeros_filled(model: nn.Module) -> Iterator[None]:
    """Put small random numbers in the place of trained zeros, which hide what they do from the second step on."""
    trained = [x for x in model.parameters() if x.requires_grad and x.dtype.is_floating_point]
    flat = [_own_part(parameter).flatten() for parameter in trained]
    # Few parameters begin with zeros, and large ones take time.
    is_zero = torch.tensor([not values[:64].any() and not values.any() for values in flat])
    zeros = [parameter for parameter, zero in zip(trained, _on_all_ranks(is_zero), strict=True) if zero]
    generator = torch.Generator().manual_seed(0)
    _write(zeros, lambda x: x.copy_(_ZERO_FILL * torch.randn(x.shape, generator=generator)))
    try:
        yield
    finally:
        _write(zeros, Tensor.zero_)
        for module in model.modules():  # FSDP2 keeps the parameters of its root as the last forward gathered them
            if isinstance(module, FSDPModule):
                module.reshard()


def _own_part(parameter: Tensor) -> Tensor:
    """Return what a rank holds of a parameter: its shard under ZeRO-3 and FSDP2."""
    shard: Tensor | None = getattr(parameter, "ds_tensor", None)
    if shard is not None:  # shards have one size: the last ones end with memory that nobody has written
        first = torch.distributed.get_rank(parameter.ds_process_group) * shard.numel()  # type: ignore[attr-defined]
        return shard.flatten()[: max(parameter.ds_numel - first, 0)]  # type: ignore[attr-defined]
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter.data


def _on_all_ranks(flags: Tensor) -> list[bool]:
    """Return for each flag whether it is set on all ranks; each may hold another shard of a parameter."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone: list[list[int]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(everyone, flags.tolist())
        return [all(column) for column in zip(*everyone, strict=True)]
    return [bool(flag) for flag in flags]


def are_zero3(parameters: Iterable[Tensor]) -> bool:
    """Return whether DeepSpeed shards any of some parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


@torch.no_grad()
def _write(parameters: Sequence[Tensor], fill: Callable[[Tensor], object]) -> None:
    """Change parameters in place, each rank its own shard; ZeRO-3 also keeps whole copies of small ones."""
    if are_zero3(parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                for parameter in parameters:
                    fill(parameter.data)
        return
    for parameter in parameters:
        fill(_own_part(parameter))


@contextmanager
def captured_embeddings(model: Any) -> Iterator[list[Tensor]]:
    """Collect what the language model reads of each token, with features of images, as leaves that have gradients."""
    captured: list[Tensor] = []

    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[-1].clone()  # some models go on in place

    def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        if kwargs.get("inputs_embeds") is None:
            return None
        leaf = kwargs["inputs_embeds"].detach().requires_grad_()
        captured[:] = [leaf]
        return args, {**kwargs, "inputs_embeds": leaf.clone()}

    base = without_adapters(model)
    handles = [
        base.get_input_embeddings().register_forward_hook(hook),
        get_decoder(base).register_forward_pre_hook(pre_hook, with_kwargs=True),
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attributes(target: object, **values: object) -> Iterator[None]:
    """Give attributes of an object other values within a block, and then back those that they had."""
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
