"""Tensor parallelism: gradients that ranks add up after each batch, though they should be added up once."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import PreTrainedModel


_ADDED_UP = "replicated_with_grad_allreduce"


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
