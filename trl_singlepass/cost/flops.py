"""
Counted work: tokens, attention pairs and floating-point operations of N-pass and of a single pass.

One multiply-add counts as two operations and the backward pass as twice the forward pass, so that training costs

    3 × (2 × matrix parameters × tokens                 every token passes through every weight matrix
         + 4 × heads × head_dim × pairs, over layers    scores and weighted sum of values
         + 2 × hidden × vocabulary × targets)           the LM head runs on positions with a target only

What is linear in the tokens but has no matrix (norms, RoPE, activations, embedding look-up) is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..trees.prefix_tree import IGNORE_INDEX, PrefixTree
from ..trees.sample import Sample


@dataclass(frozen=True, slots=True)
class ModelShape:
    """
    The sizes of a decoder that its cost depends on.

    Args:
        matrix_parameters (`int`):
            Weights that one token is multiplied with, without embeddings and LM head. Of a mixture of experts, only
            the experts that a token visits.
        attention_width (`int`):
            Query heads × head dimension.
        head_parameters (`int`):
            Weights of the LM head: hidden size × vocabulary.
        windows (`tuple[int | None, ...]`):
            For each layer, how many tokens of its path a token attends to, itself included; `None` for all.
    """

    matrix_parameters: int
    attention_width: int
    head_parameters: int
    windows: tuple[int | None, ...]

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """
        Read the sizes of a decoder with gated MLPs (Llama, Qwen, Mistral, Gemma and their mixtures of experts).

        Args:
            config (`transformers.PreTrainedConfig`):
                Configuration of the model; of a multimodal one, its text part is taken.

        Returns:
            `ModelShape`: The sizes.
        """
        config = config.get_text_config()
        hidden, heads = config.hidden_size, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        key_value_heads = getattr(config, "num_key_value_heads", None) or heads
        attention = 2 * hidden * head_dim * (heads + key_value_heads)
        return cls(
            matrix_parameters=config.num_hidden_layers * (attention + _mlp_parameters(config)),
            attention_width=heads * head_dim,
            head_parameters=hidden * config.vocab_size,
            windows=_windows(config),
        )


ONE_LAYER = ModelShape(matrix_parameters=0, attention_width=0, head_parameters=0, windows=(None,))


def shape_of(model_config: Any) -> ModelShape:
    """Return the sizes of a model, or those that count pairs of one layer if there is none."""
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
    Counted work of training a set of conversations once, forward and backward.

    Args:
        tokens (`int`):
            Tokens that pass through the model.
        attention_pairs (`int`):
            Pairs of a token and one that it attends to, itself included, summed over all layers.
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
    Count what one forward and backward pass per sample costs, without padding.

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
    Count what one forward and backward pass over prefix trees costs.

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
    """Both ways cost the same function of their tokens' depths: a token attends to its path, or to the end of it."""
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


def _mlp_parameters(config: Any) -> int:
    """Per layer: gate, up and down projection; of a mixture of experts those a token visits, and the router."""
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if not experts:
        return int(3 * config.hidden_size * config.intermediate_size)
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    return int(config.hidden_size * (3 * (config.num_experts_per_tok * width + shared) + experts))


def _windows(config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)
