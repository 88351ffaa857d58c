"""What each token's loss weighs: per message, per part of a completion, and how a dataset's mean is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..trees.sample import Sample


LossReduction = Literal["token", "turn", "conversation"]
LOSS_REDUCTIONS: tuple[LossReduction, ...] = ("token", "turn", "conversation")


def message_weights(messages: Sequence[Mapping[str, Any]]) -> list[float]:
    """
    Return the loss weight of each message of a conversation.

    Args:
        messages (`Sequence[Mapping[str, Any]]`):
            Messages; `weight` is a factor of the message's loss (0 makes it context), `train: false` the same as a
            weight of 0. Without either, a message weighs 1.

    Returns:
        `list[float]`: One weight per message.

    Raises:
        `ValueError`: If a weight is negative or no finite number, or `train` is no boolean.
    """
    return [_weight_of(message, index) for index, message in enumerate(messages)]


def _weight_of(message: Mapping[str, Any], index: int) -> float:
    weight, train = message.get("weight"), message.get("train")
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"Message {index} has train={train!r}. Set it to true or false.")
    if weight is None:
        return float(train is not False)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or weight < 0:
        raise ValueError(
            f"Message {index} has weight={weight!r}. A weight is a number of 0 or more; 0 leaves a message untrained."
        )
    return float(weight) if train is not False else 0.0


def weigh(
    samples: Sequence[Sample],
    weights: Sequence[float],
    *,
    loss_reduction: LossReduction = "token",
    reasoning_weight: float = 1.0,
) -> list[Sample]:
    """
    Return the samples of one conversation with the loss weights that a reduction asks for.

    A token's own weight is `u = m · r · w`: the weight `m` of its message, `r = reasoning_weight` in the reasoning of
    the completion and 1 elsewhere, and the weight `w` that the sample came with. The loss of a step is
    `Σ v · nll / Σ v` over all its tokens, with

    - `"token"`: `v = u`, the mean over tokens;
    - `"turn"`: `v = m · u / Σ_turn u`, the mean over turns of each turn's mean;
    - `"conversation"`: `v = u / Σ_conversation u`, the mean over conversations of each one's mean.

    Args:
        samples (`Sequence[Sample]`):
            Samples of one conversation, cut as they are trained.
        weights (`Sequence[float]`):
            Weight of each sample's message.
        loss_reduction (`str`, *optional*, defaults to `"token"`):
            `"token"`, `"turn"` or `"conversation"`.
        reasoning_weight (`float`, *optional*, defaults to `1.0`):
            Factor of the loss of reasoning.

    Returns:
        `list[Sample]`: The same samples, reweighed.
    """
    own = [
        sample.loss_weights * weight * _part_weights(sample, reasoning_weight)
        for sample, weight in zip(samples, weights, strict=True)
    ]
    if loss_reduction == "turn":
        own = [_scaled_to(values, weight) for values, weight in zip(own, weights, strict=True)]
    elif loss_reduction == "conversation":
        total = sum(float(values.sum()) for values in own)
        own = [values / total if total > 0 else values for values in own]
    return [replace(sample, loss_weights=values) for sample, values in zip(samples, own, strict=True)]


def _part_weights(sample: Sample, reasoning_weight: float) -> NDArray[np.float64]:
    weights = np.ones(len(sample))
    weights[sample.prompt_length : sample.prompt_length + sample.reasoning_length] = reasoning_weight
    return weights


def _scaled_to(values: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    return values * (total / values.sum()) if values.sum() > 0 else values
