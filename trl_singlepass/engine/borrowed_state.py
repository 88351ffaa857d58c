"""Contexts that change a model for a measurement, and give it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..recurrent.layer_kinds import get_decoder
from .enable import without_adapters


_ZERO_FILL = 0.02  # standard deviation of what takes the place of parameters that start at zero


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout and gradient checkpointing; each module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def without_compilation() -> AbstractContextManager[Any]:
    """Run compiled modules as they were written: compiling them for a row of the check's size takes minutes."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def zeros_filled(model: nn.Module) -> Iterator[None]:
    """
    Put small random numbers in the place of trained parameters that are all zero, and zeros back afterwards.

    An adapter or a gate that starts at zero has no effect yet, and hides what it will do from the second step on.
    """
    filled: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            own = _own_part(parameter)
            if parameter.requires_grad and own.dtype.is_floating_point and own.numel() and not own.any():
                own.copy_(_ZERO_FILL * torch.randn(own.shape, generator=generator))
                filled.append(own)
    try:
        yield
    finally:
        for own in filled:
            own.detach().zero_()


def _own_part(parameter: Tensor) -> Tensor:
    """Return what a rank holds of a parameter: its shard under ZeRO-3 and FSDP2."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is not None:
        return shard  # type: ignore[no-any-return]
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter.data


@contextmanager
def captured_embeddings(model: Any) -> Iterator[list[Tensor]]:
    """
    Collect what the language model reads of each token as leaves, so that they have gradients even if it is frozen.

    That is the output of the embedding layer, or, where a model puts features of images into it, what comes of that.
    """
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
