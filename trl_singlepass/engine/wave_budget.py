"""`wave_tokens="auto"`: how many tokens may have activations at once, from free memory and counted bytes."""

from __future__ import annotations

from contextvars import Context

import psutil
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from ..attention.varlen_plan import KEYS_PER_CALL
from ..cost.flops import head_sizes
from ..cost.memory import ActivationBytes
from ..recurrent.introspection import get_decoder, path_dependent_layers
from .borrowed_state import in_evaluation_mode
from .enable import without_adapters


# The rest is for what is not counted: fragmentation, temporary buffers, keys and values that wait for later waves.
_USABLE_SHARE = 0.8
_MULTIPLE = 256
# About 250 launches of 5 µs (`benchmarks/host_time.py` counts them), and half of an H100's peak in bfloat16.
SECONDS_PER_LAYER, OPERATIONS_PER_SECOND = 250 * 5e-6, 5e14
# Lengths of the two passes whose difference counts: multiples of the chunks in which scans run.
_SHORT, _LONG = 128, 384


def wave_tokens_that_fit(model: PreTrainedModel, args: TrainingArguments) -> tuple[int, str]:
    """
    Return how many tokens may have activations at the same time, a multiple of 256, and the calculation behind it.

    If not even 256 tokens fit, this raises `ValueError`.
    """
    itemsize = 2 if args.bf16 or args.fp16 else next(model.parameters()).element_size()
    per_token = _activation_bytes(model, args, itemsize) + _gathered_bytes(model, args.device, itemsize)
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    free = free_bytes(args.device)
    # The first step allocates gradients and two moments, all in float32.
    left = int(_USABLE_SHARE * free) - 12 * num_trained
    tokens = left // per_token // _MULTIPLE * _MULTIPLE
    gib, mib = 2**30, 2**20
    reason = (
        f"{free / gib:.1f} GiB are free on {args.device}, of which {12 * num_trained / gib:.1f} GiB go to gradients "
        f"and optimizer and a fifth stays in reserve; a token needs {per_token / mib:.2f} MiB of activations"
    )
    if tokens < _MULTIPLE:
        raise ValueError(f"wave_tokens='auto' found no room for {_MULTIPLE} tokens: {reason}. Set wave_tokens.")
    return tokens, reason


def on_shared_rows(tokens: int, accelerator: Accelerator, *, divides_layers: bool) -> int:
    """
    Return how many tokens a wave may have, given how many fit on this rank.

    Ranks that share rows cut them alike, so the rank with the least memory decides. Each has its part of a wave,
    unless there are layers that each rank runs on all of it. If ranks share rows, every rank must call;
    `divides_layers` says whether they divide the work of every layer.
    """
    size: int = getattr(accelerator.parallelism_config, "sp_size", 1)
    if size == 1:
        return tokens
    least = int(accelerator.gather(torch.tensor([tokens], device=accelerator.device)).min())
    return least * size if divides_layers else least


def tokens_that_hide_launches(model: PreTrainedModel) -> int:
    """
    Return from how many tokens on an H100 computes a wave for longer than the host takes to launch it.

    With gradient checkpointing, a token takes eight operations per weight of a layer; of experts, those that it visits
    count.
    """
    layers = [module for module in get_decoder(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    experts_per_token = getattr(model.config.get_text_config(), "num_experts_per_tok", None)

    def num_visited(weight: nn.Parameter) -> int:
        is_of_experts = weight.dim() == 3 and isinstance(experts_per_token, int)
        return weight[:experts_per_token].numel() if is_of_experts else weight.numel()

    weights = sum(num_visited(weight) for layer in layers for weight in layer.parameters())
    if not weights:  # other ranks hold them
        return 1
    return int(len(layers) * SECONDS_PER_LAYER * OPERATIONS_PER_SECOND / (8 * weights))


def _activation_bytes(model: PreTrainedModel, args: TrainingArguments, itemsize: int) -> int:
    """Return the activations of a token: counted, or measured where layers are recurrent or convolve."""
    checkpointing, base = bool(args.gradient_checkpointing), without_adapters(model)
    if not path_dependent_layers(base):
        return ActivationBytes.from_config(model.config, itemsize, checkpointing=checkpointing).per_token
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    with torch.autocast(args.device.type, dtype=dtype, enabled=args.bf16 or args.fp16):
        return measure_activation_bytes(base, args.device, checkpointing=checkpointing)


def _gathered_bytes(model: PreTrainedModel, device: torch.device, itemsize: int) -> int:
    """Return what a varlen kernel adds per token: gradients of gathered keys and values for every query head."""
    config = model.config.get_text_config()
    is_varlen = str(config._attn_implementation).startswith("tree_varlen")
    if not is_varlen and (device.type != "cuda" or itemsize != 2):
        return 0  # block by block
    heads, _, head_dim = head_sizes(config)
    return KEYS_PER_CALL * 2 * heads * head_dim * itemsize


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device, including those that PyTorch holds unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return int(psutil.virtual_memory().available)


# Measured where it cannot be counted: in hybrids -------------------------------------------------------------------


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
