"""Bytes that a model saves per token for its backward pass, measured where they cannot be counted: in hybrids."""

from __future__ import annotations

from contextvars import Context

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..engine.borrowed_state import in_evaluation_mode
from ..recurrent.introspection import get_decoder


# Lengths of the two passes whose difference counts: multiples of the chunks in which scans run.
_SHORT, _LONG = 128, 384


def measure_activation_bytes(model: PreTrainedModel, device: torch.device, *, checkpointing: bool) -> int:
    """
    Return the bytes per token that the decoder of a model saves for its backward pass.

    The decoder runs forward on 128 and on 384 tokens, and the difference between what both save is divided by 256:
    weights and buffers, which do not depend on the length, drop out. With gradient checkpointing, a layer saves its
    input, and one layer at a time everything.

    Takes the whole model, on its device and in the precision of training.
    """
    decoder = get_decoder(model)
    with in_evaluation_mode(decoder):  # without checkpointing
        # In an empty context there is no tree, which the row of the step has by now.
        short, long = (Context().run(_saved_bytes, decoder, length, device) for length in (_SHORT, _LONG))
    per_layer = [(b - a) // (_LONG - _SHORT) for a, b in zip(short[1:], long[1:], strict=True)]
    if not checkpointing or not per_layer:
        return (long[0] - short[0]) // (_LONG - _SHORT)
    itemsize = next(model.parameters()).element_size()
    return int(len(per_layer) * model.config.get_text_config().hidden_size * itemsize + max(per_layer))


def _saved_bytes(decoder: nn.Module, length: int, device: torch.device) -> list[int]:
    """Return the bytes that a forward pass saves: in all, and in each layer that can be checkpointed."""
    held: dict[int, torch.Tensor] = {}
    by_layer: list[int] = []

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other takes its address
        return tensor

    def total() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    def enter(*_: object) -> None:
        by_layer.append(-total())

    def leave(*_: object) -> None:
        by_layer[-1] += total()

    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    hooks = [hook for x in layers for hook in (x.register_forward_pre_hook(enter), x.register_forward_hook(leave))]
    tokens = torch.zeros(1, length, dtype=torch.long, device=device)
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            decoder(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [total(), *by_layer]
