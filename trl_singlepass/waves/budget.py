"""How many tokens may have activations at the same time, from free memory and counted bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch


# Room for what is not counted: fragments, temporary buffers, keys and values that wait for later waves.
_USABLE = 0.8
_MULTIPLE = 256


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """
    Bytes that backward needs of each token that runs.

    Args:
        per_layer (`int`):
            What one decoder layer saves.
        per_token (`int`):
            What all layers save.
        key_value (`int`):
            Keys and values of all layers, as a token that is handed on keeps them, without their gradients.
    """

    per_layer: int
    per_token: int
    key_value: int

    @classmethod
    def of(cls, config: Any, itemsize: int, *, checkpointing: bool) -> ActivationBytes:
        """
        Count the bytes of a decoder with gated MLPs.

        A layer saves, per token: for each of its two norms the input, its copy in float32 and the normalised copy; the
        inputs of its four kinds of matrices; queries and keys before and after rotation, values, the attention output
        and its log-sum-exp; and of the MLP gate, activated gate, up and their product. Norms of queries and keys
        (Qwen3) save what the other norms do.

        Args:
            config (`transformers.PreTrainedConfig`):
                Configuration of the model.
            itemsize (`int`):
                Bytes of one activation.
            checkpointing (`bool`):
                Whether layers save their input only, and run again one by one in backward.
        """
        config = config.get_text_config()
        hidden, heads = config.hidden_size, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        inner *= getattr(config, "num_experts_per_tok", None) or 1
        query, key_value = heads * head_dim, 2 * kv_heads * head_dim
        norms = 2 * hidden * (2 * itemsize + 4) + (query + key_value // 2) * (itemsize + 4)
        attention = (2 * hidden + 3 * query + 2 * key_value) * itemsize + 4 * heads
        layer = norms + attention + 4 * inner * itemsize
        layers = config.num_hidden_layers
        total = layers * hidden * itemsize + layer if checkpointing else layers * layer
        return cls(layer, total, layers * key_value * itemsize)


def wave_tokens_that_fit(model: Any, args: Any) -> tuple[int, str]:
    """
    Return how many tokens may run at the same time, and why.

    Args:
        model (`transformers.PreTrainedModel`, `peft.PeftModel`):
            Model, on its device.
        args (`SinglePassSFTConfig`):
            Arguments of the trainer.

    Returns:
        `tuple[int, str]`: The number of tokens, a multiple of 256, and the count behind it.

    Raises:
        `ValueError`: If not even 256 tokens fit.
    """
    device = args.device
    itemsize = 2 if args.bf16 or args.fp16 else next(model.parameters()).element_size()
    count = ActivationBytes.of(model.config, itemsize, checkpointing=bool(args.gradient_checkpointing))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    free = free_bytes(device)
    left = int(_USABLE * free) - 12 * trained  # gradients and two moments in float32, allocated by the first step
    tokens = left // count.per_token // _MULTIPLE * _MULTIPLE
    gib = 2**30
    reason = (
        f"{free / gib:.1f} GiB are free on {device}, of which {12 * trained / gib:.1f} GiB go to gradients and "
        f"optimizer and a fifth stays in reserve; a token needs {count.per_token / 2**20:.2f} MiB of activations"
    )
    if tokens < _MULTIPLE:
        raise ValueError(f"wave_tokens='auto' found no room for {_MULTIPLE} tokens: {reason}. Set wave_tokens.")
    return tokens, reason


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device, those that PyTorch holds unused included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return int(psutil.virtual_memory().available)
