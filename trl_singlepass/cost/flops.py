"""
Count tokens, attention pairs and floating-point operations of N-pass and of a single pass.

One multiply-add counts as two operations and the backward pass as twice the forward pass, so that training costs

    3 × (2 × matrix parameters × tokens                 every token passes through every weight matrix
         + 4 × heads × head_dim × pairs, over layers    scores and weighted sum of values
         + scan operations × tokens                     chunks of a gated delta rule, in hybrids
         + 2 × hidden × vocabulary × targets)           the LM head runs only on positions with a target

Norms, RoPE, activations and the embedding look-up, which are linear in the tokens and have no matrix, are not counted.
For example, one sample of 3 tokens and 2 targets has 1 + 2 + 3 = 6 pairs in each layer; with 7 matrix parameters, 2
layers of attention width 3 and 5 LM head parameters it costs 3 × (2 × 7 × 3 + 4 × 3 × 12 + 2 × 5 × 2) = 618.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..trees.prefix_tree import IGNORE_INDEX, PrefixTree
from ..trees.sample import Sample


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder that its cost depends on."""

    # Weights that one token is multiplied with, without embeddings and LM head; of experts, those that a token visits.
    matrix_parameters: int
    attention_width: int  # query heads × head dimension
    head_parameters: int  # weights of the LM head: hidden size × vocabulary
    windows: tuple[int | None, ...]  # tokens of its path that a token attends to in each layer; `None` for all
    scan_flops: int = 0  # operations of the recurrences of all layers for one token, forward

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> ModelShape:
        """
        Read the sizes of a decoder with gated MLPs (Llama, Qwen, Mistral, Gemma, their mixtures of experts, gpt-oss,
        and hybrids with gated delta rules such as Qwen3.5); of a multimodal one, those of its text part.
        """
        config = config.get_text_config()
        heads, kv_heads, head_dim = head_sizes(config)
        gates = heads if config.model_type in GATED_ATTENTION else 0
        attention = config.hidden_size * head_dim * (2 * heads + 2 * kv_heads + gates)
        types = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
        num_scans = types.count("linear_attention") if hasattr(config, "linear_num_value_heads") else 0
        attending = [kind for kind in types if not (num_scans and kind == "linear_attention")]
        window = getattr(config, "sliding_window", None)
        scan = gated_delta_cost(config) if num_scans else (0, 0)
        num_layers = config.num_hidden_layers
        return cls(
            matrix_parameters=(num_layers - num_scans) * attention
            + num_scans * scan[0]
            + num_layers * _mlp_parameters(config),
            attention_width=heads * head_dim,
            head_parameters=config.hidden_size * config.vocab_size,
            windows=tuple(window if kind == "sliding_attention" else None for kind in attending),
            scan_flops=num_scans * scan[1],
        )


# Models whose query projection computes a gate for each number of the attention output as well.
GATED_ATTENTION = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
GATED_DELTA_CHUNK = 64  # tokens; of transformers' own code and of flash-linear-attention
ONE_LAYER = ModelShape(matrix_parameters=0, attention_width=0, head_parameters=0, windows=(None,))


def get_model_shape(model_config: PreTrainedConfig | None) -> ModelShape:
    """Return the sizes of a model; without a model, those with which one layer's pairs are counted."""
    if model_config is None:
        return ONE_LAYER
    try:
        return ModelShape.from_config(model_config)
    except AttributeError as error:
        raise ValueError(
            f"The operations of a '{model_config.model_type}' cannot be counted: {error}. Leave model_config out to "
            "count tokens and attention pairs only."
        ) from error


@dataclass(frozen=True, slots=True)
class Cost:
    """Counted work of training on conversations once, forward and backward."""

    tokens: int  # that pass through the model
    attention_pairs: int  # a token and one that it attends to, itself included, over all layers
    targets: int  # positions whose next token is predicted
    flops: int  # floating-point operations

    @classmethod
    def total(cls, costs: Iterable[Cost]) -> Cost:
        """Add up at least one cost."""
        return cls(*map(sum, zip(*map(astuple, costs), strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(one - less for one, less in zip(astuple(self), astuple(other), strict=True)))


def npass_cost(samples: Sequence[Sample], shape: ModelShape) -> Cost:
    """Count the cost of one forward and backward pass per sample of any number of conversations, without padding."""
    depths = np.concatenate([np.arange(len(sample)) for sample in samples])
    targets = sum(int((sample.loss_weights > 0).sum()) for sample in samples)
    return _count(depths, targets, shape)


def single_pass_cost(trees: Sequence[PrefixTree], shape: ModelShape) -> Cost:
    """Count the cost of one forward and backward pass over the prefix trees of any number of conversations."""
    depths = np.concatenate([tree.position_ids for tree in trees])
    targets = sum(int((tree.labels != IGNORE_INDEX).sum()) for tree in trees)
    return _count(depths, targets, shape)


def prefix_cost(length: int, shape: ModelShape) -> Cost:
    """Count the cost of the first `length` tokens of a sequence, none of which is trained."""
    return _count(np.arange(length), 0, shape)


def _count(depths: NDArray[np.int64], targets: int, shape: ModelShape) -> Cost:
    """Count the cost, for both ways a function of depths: a token attends to its path, or to the end of it."""
    pairs_with = {
        window: int((depths + 1 if window is None else np.minimum(depths + 1, window)).sum())
        for window in set(shape.windows)
    }
    pairs = sum(pairs_with[window] for window in shape.windows)
    forward = (
        (2 * shape.matrix_parameters + shape.scan_flops) * len(depths)
        + 4 * shape.attention_width * pairs
        + 2 * shape.head_parameters * targets
    )
    return Cost(tokens=len(depths), attention_pairs=pairs, targets=targets, flops=3 * forward)


def head_sizes(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Return the numbers of query heads and of key/value heads, and the size of a head, from a text configuration."""
    heads: int = config.num_attention_heads
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _mlp_parameters(config: PreTrainedConfig) -> int:
    """Per layer: gate, up and down projections; in a mixture of experts those that a token visits, and the router."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if not experts:
        return int(3 * config.hidden_size * config.intermediate_size)
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    return int(config.hidden_size * (3 * (config.num_experts_per_tok * width + shared) + experts))


def gated_delta_cost(config: PreTrainedConfig) -> tuple[int, int]:
    """
    Count a layer with a gated delta rule, beside its MLP: matrix parameters, with those of the convolution, and
    operations of the scan per token.

    In chunks of `C` tokens, each head multiplies keys with keys and queries with keys (`2 · 2·C·d_k` operations per
    token), solves a triangular system for its values and keys (`C·(d_k + d_v)`), applies scores to values (`2·C·d_v`),
    and reads the state with keys and queries and updates it (`3 · 2·d_k·d_v`).

    Source: `torch_chunk_gated_delta_rule` of transformers; Gated Delta Networks, arXiv 2412.06464, section 3.3.
    """
    heads, key_dim, value_dim = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    keys, values = config.linear_num_key_heads * key_dim, heads * value_dim
    mixed = 2 * keys + values
    # Queries, keys and values, the output's gate, two numbers per head (decay and step), the output.
    matrices = config.hidden_size * (mixed + values + 2 * heads + values) + mixed * config.linear_conv_kernel_dim
    scores = GATED_DELTA_CHUNK * (4 * key_dim + (key_dim + value_dim) + 2 * value_dim)
    return matrices, heads * (scores + 6 * key_dim * value_dim)
