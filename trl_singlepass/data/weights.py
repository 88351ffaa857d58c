"""The loss weight of each token: by message, by part of the completion, and by what the loss is a mean of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..trees.errors import DataError
from ..trees.sample import Sample


class LossReduction(StrEnum):
    """What counts the same in the loss."""

    TOKEN = "token"
    TURN = "turn"
    CONVERSATION = "conversation"


# A product of three weights, summed over a row, stays a number in float32.
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-9, 1e9
WEIGHT_RANGE = f"0, or between {SMALLEST_WEIGHT:g} and {LARGEST_WEIGHT:g}"


def are_weights(values: ArrayLike) -> bool:
    """Return whether numbers are loss weights that float32 keeps apart from 0 and infinity."""
    numbers = np.asarray(values, np.float64)
    return bool(((numbers == 0) | ((numbers >= SMALLEST_WEIGHT) & (numbers <= LARGEST_WEIGHT))).all())


def message_weights(messages: Sequence[Mapping[str, object]], what: str = "Message") -> list[float]:
    """
    Return the loss weight of each message of a conversation, or of `what` else has one.

    `weight` is a factor of the message's loss (0 makes it context), `train: false` means a weight of 0. A message with
    neither has weight 1. Raises `ValueError` if a weight is none of `WEIGHT_RANGE`, or `train` is not a boolean.
    """
    return [_message_weight(message, f"{what} {index}") for index, message in enumerate(messages)]


def _message_weight(message: Mapping[str, object], name: str) -> float:
    weight, train = message.get("weight"), message.get("train")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{name} has train={train!r}. Set it to true or false.")
    if weight is None:
        return float(train is not False)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not are_weights(weight):
        raise DataError(f"{name} has weight={weight!r}. A weight is {WEIGHT_RANGE}; 0 leaves it untrained.")
    return float(weight) if train is not False else 0.0


def weigh(
    samples: Sequence[Sample],
    weights: Sequence[float],
    *,
    loss_reduction: LossReduction = LossReduction.TOKEN,
    reasoning_weight: float = 1.0,
) -> list[Sample]:
    """
    Return the samples of one conversation with the loss weights of a reduction.

    A token's own weight is `u = m · r · w`: the weight `m` of its message, `r = reasoning_weight` for reasoning and 1
    elsewhere, and the weight `w` that it has in the sample. The loss of a step is `Σ v · nll / Σ v` over its tokens,
    with

    - `"token"`: `v = u`, the mean over tokens;
    - `"turn"`: `v = m · u / Σ_turn u`, the mean over turns of each turn's mean;
    - `"conversation"`: `v = u / Σ_conversation u`, the mean over conversations of each conversation's mean.

    For two turns of 2 and 4 completion tokens, all of weight 1: `v` is 1 for each token, then `1/2` and `1/4`, then
    `1/6`.

    Samples are truncated as they are trained; `weights` are those of their messages.
    """
    if loss_reduction == LossReduction.TOKEN and reasoning_weight == 1 and set(weights) <= {1.0}:
        return list(samples)
    own = [
        sample.weights.own * weight * _part_weights(sample, reasoning_weight)
        for sample, weight in zip(samples, weights, strict=True)
    ]
    if loss_reduction == LossReduction.TURN:
        own = [_scaled_to(values, weight) for values, weight in zip(own, weights, strict=True)]
    elif loss_reduction == LossReduction.CONVERSATION:
        total = sum(float(values.sum()) for values in own)
        own = [values / total if total > 0 else values for values in own]
    return [sample.reweighed(values) for sample, values in zip(samples, own, strict=True)]


def _part_weights(sample: Sample, reasoning_weight: float) -> NDArray[np.float64]:
    """Return a factor for each of `sample.weights.own`."""
    first, answer = sample.weights.kept, sample.prompt_length + sample.reasoning_length
    weights = np.ones(len(sample) - first)
    weights[max(sample.prompt_length - first, 0) : max(answer - first, 0)] = reasoning_weight
    return weights


def _scaled_to(values: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    return values * (total / values.sum()) if values.sum() > 0 else values
