"""
Memory of a row, in counted bytes: how many ranks should share it, and how many of its tokens may have activations.

Training counts with [`ActivationBytes`] (for `wave_tokens="auto"`). The functions are for planning a run by hand: they
tell the smallest `sp_size` with which rows fit, and what its communication costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .flops import ModelShape, head_sizes


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


_ITEMSIZE = 2  # bytes of a number in bf16


def row_bytes(config: PreTrainedConfig, num_tokens: int, sp_size: int = 1) -> int:
    """
    Return the bytes that a row takes on each of the `sp_size` ranks that share it, with gradient checkpointing.

    These are the hidden states between layers, `2 · tokens · hidden · layers`, and what one layer saves for each token
    while it is recomputed: 4 hidden states per norm (one in float32 counts twice), queries 6 times, keys and values 5
    times, and 4 vectors of a dense gated MLP. Logits are not saved, and tree attention adds little.
    """
    config = config.get_text_config()
    queries, keys = _widths(config, sp_size)
    layer = 8 * config.hidden_size + 6 * queries + 5 * keys + 4 * config.intermediate_size
    numbers: int = config.num_hidden_layers * config.hidden_size + layer
    return _ITEMSIZE * numbers * -(-num_tokens // sp_size)


def exchange_bytes(config: PreTrainedConfig, num_tokens: int, sp_size: int, *, passes: int = 3) -> int:
    """
    Return the bytes that each rank of a group sends to the others for a row.

    Around the attention of each layer, a rank sends `(sp_size - 1) / sp_size` of its queries, keys, values and
    results, which are `2 · (queries + keys) · 2 · tokens / sp_size` bytes: once forward, once backward, and once more
    when a checkpointed layer is recomputed. Without gradient checkpointing, `passes` is 2.
    """
    config = config.get_text_config()
    queries, keys = _widths(config, sp_size)
    part = -(-num_tokens // sp_size)
    numbers: int = config.num_hidden_layers * 2 * (queries + keys) * part
    return passes * _ITEMSIZE * numbers * (sp_size - 1) // sp_size


def exchange_share(
    config: PreTrainedConfig, num_tokens: int, num_pairs: int, sp_size: int, *, flops: float, bandwidth: float
) -> float:
    """
    Return the time that ranks exchange data ÷ the time that they compute for a row, with gradient checkpointing.

    `num_pairs` counts a token with an ancestor or itself: `tokens · (tokens + 1) / 2` without branches. A rank
    achieves `flops` operations and sends `bandwidth` bytes per second.
    """
    shape = ModelShape.from_config(config)
    forward = 2 * shape.matrix_parameters * num_tokens + 4 * shape.attention_width * num_pairs * len(shape.windows)
    compute = 4 * forward / sp_size / flops  # forward, twice that for backward, and forward again
    return exchange_bytes(config, num_tokens, sp_size) / bandwidth / compute


def smallest_group(config: PreTrainedConfig, num_tokens: int, free_bytes: float) -> int | None:
    """
    Return the smallest `sp_size` with which a row fits, or `None`.

    `free_bytes` are what the model and its optimizer leave free on each rank. More ranks than needed only exchange
    more: with rows of their own, they train as many tokens in the same time.
    """
    heads, kv_heads, _ = head_sizes(config.get_text_config())
    sizes = (size for size in range(1, heads + 1) if heads % size == 0)
    shared = (size for size in sizes if kv_heads % size == 0 or size % kv_heads == 0)  # as DeepSpeed can divide heads
    return next((size for size in shared if row_bytes(config, num_tokens, size) <= free_bytes), None)


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """Bytes per token that a decoder saves for its backward."""

    per_token: int  # activations of all layers
    # keys and values of all layers, without gradients: what a token with descendants in later waves keeps
    key_value: int

    @classmethod
    def from_config(cls, config: PreTrainedConfig, itemsize: int, *, checkpointing: bool) -> ActivationBytes:
        """
        Count the bytes of a decoder with gated MLPs, with numbers of `itemsize` bytes.

        Per token, a layer saves: for each norm the input, its float32 copy and the output; the inputs of its four
        kinds of matrices; queries and keys before and after rotation, values, the attention output and its
        log-sum-exp; in the MLP the gate, the activated gate, up and the product. With `checkpointing`, layers save
        only their input and are recomputed one by one.
        """
        config = config.get_text_config()
        hidden, heads = config.hidden_size, config.num_attention_heads
        queries, keys = _widths(config, 1)
        inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        inner *= getattr(config, "num_experts_per_tok", None) or 1
        norms = 2 * hidden * (2 * itemsize + 4) + (queries + keys) * (itemsize + 4)
        attention = (2 * hidden + 3 * queries + 4 * keys) * itemsize + 4 * heads
        layer = norms + attention + 4 * inner * itemsize
        layers = config.num_hidden_layers
        per_token = layers * hidden * itemsize + layer if checkpointing else layers * layer
        return cls(per_token, layers * 2 * keys * itemsize)


def _widths(config: PreTrainedConfig, sp_size: int) -> tuple[int, int]:
    """Return the numbers per token in queries and in keys, which are repeated if there are fewer heads than ranks."""
    heads, kv_heads, head_dim = head_sizes(config)
    return heads * head_dim, max(kv_heads, sp_size) * head_dim
