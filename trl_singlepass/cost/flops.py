"""
Count tokens, attention pairs and floating-point operations of N-pass and of a single pass.

One multiply-add counts as two operations and the backward pass as twice the forward pass, so that training costs

    3 × (2 × matrix parameters × tokens                 every token passes through every weight matrix
         + 4 × heads × head_dim × pairs, over layers    scores and weighted sum of values
         + 2 × hidden × vocabulary × targets)           the LM head runs only on positions with a target

Norms, RoPE, activations and the embedding look-up, which are linear in the tokens and have no matrix, are not counted.
For example, one sample of 3 tokens and 2 targets has 1 + 2 + 3 = 6 pairs in each layer; with 7 matrix parameters, 2
layers of attention width 3 and 5 LM head parameters it costs 3 × (2 × 7 × 3 + 4 × 3 × 12 + 2 × 5 × 2) = 618.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..trees.prefix_tree import IGNORE_INDEX, PrefixTree
from ..trees.sample import Sample


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class ModelShape:
    """
    The sizes of a decoder that its cost depends on.

    Args:
        matrix_parameters (`int`):
            Weights that one token is multiplied with, without embeddings and LM head. In a mixture of experts, only
            those of the experts that a token visits.
        attention_width (`int`):
            Query heads × head dimension.
        head_parameters (`int`):
            Weights of the LM head: hidden size × vocabulary.
        windows (`tuple[int | None, ...]`):
            How many tokens of its path a token attends to in each layer, itself included; `None` for all.
    """

    matrix_parameters: int
    attention_width: int
    head_parameters: int
    windows: tuple[int | None, ...]

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> ModelShape:
        """
        Read the sizes of a decoder with gated MLPs (Llama, Qwen, Mistral, Gemma and their mixtures of experts).

        Args:
            config (`transformers.PreTrainedConfig`):
                Configuration of the model; for a multimodal one, its text part is taken.

        Returns:
            `ModelShape`: The sizes.
        """
        config = config.get_text_config()
        heads, kv_heads, head_dim = head_sizes(config)
        attention = 2 * config.hidden_size * head_dim * (heads + kv_heads)
        return cls(
            matrix_parameters=config.num_hidden_layers * (attention + _mlp_parameters(config)),
            attention_width=heads * head_dim,
            head_parameters=config.hidden_size * config.vocab_size,
            windows=_windows(config),
        )


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
    """
    Counted work of training on conversations once, forward and backward.

    Args:
        tokens (`int`):
            Tokens that pass through the model.
        attention_pairs (`int`):
            Pairs of a token and one that it attends to, itself included, over all layers.
        targets (`int`):
            Positions whose next token is predicted.
        flops (`int`):
            Floating-point operations.
    """

    tokens: int
    attention_pairs: int
    targets: int
    flops: int


def npass_cost(samples: Sequence[Sample], shape: ModelShape) -> Cost:
    """
    Count the cost of one forward and backward pass per sample, without padding.

    Args:
        samples (`Sequence[Sample]`):
            Samples of any number of conversations.
        shape (`ModelShape`):
            Sizes of the model.

    Returns:
        `Cost`: The cost.
    """
    depths = np.concatenate([np.arange(len(sample)) for sample in samples])
    targets = sum(int((sample.loss_weights > 0).sum()) for sample in samples)
    return _count(depths, targets, shape)


def single_pass_cost(trees: Sequence[PrefixTree], shape: ModelShape) -> Cost:
    """
    Count the cost of one forward and backward pass over prefix trees.

    Args:
        trees (`Sequence[PrefixTree]`):
            Trees of any number of conversations.
        shape (`ModelShape`):
            Sizes of the model.

    Returns:
        `Cost`: The cost.
    """
    depths = np.concatenate([tree.position_ids for tree in trees])
    targets = sum(int((tree.labels != IGNORE_INDEX).sum()) for tree in trees)
    return _count(depths, targets, shape)


def _count(depths: NDArray[np.int64], targets: int, shape: ModelShape) -> Cost:
    """Count the cost, for both ways a function of depths: a token attends to its path, or to the end of it."""
    pairs_with = {
        window: int((depths + 1 if window is None else np.minimum(depths + 1, window)).sum())
        for window in set(shape.windows)
    }
    pairs = sum(pairs_with[window] for window in shape.windows)
    forward = (
        2 * shape.matrix_parameters * len(depths)
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


def _windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)
