"""Samples of conversations with the lengths of reasoning models' turns and random tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..trees.sample import Sample


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths of the parts of a turn, in tokens: the smallest and the largest of each."""

    user: tuple[int, int] = (50, 100)  # user message, or the output of a tool
    reasoning: tuple[int, int] = (300, 1000)
    answer: tuple[int, int] = (100, 200)  # answer, or a tool call
    system: int = 50  # system message, once


def conversation(
    turns: int, vocabulary: int, seed: int, sizes: Sizes = Sizes(), *, keep: bool = False
) -> list[Sample]:
    """
    Return the samples of one conversation, with token ids below `vocabulary`.

    The seed determines lengths and tokens. With `keep`, the history keeps the reasoning of earlier turns instead of
    dropping it.
    """
    random = np.random.default_rng(seed)
    history, samples = random.integers(vocabulary, size=sizes.system), []
    for index in range(turns):
        user, reasoning, answer = (
            random.integers(vocabulary, size=random.integers(low, high + 1))
            for low, high in (sizes.user, sizes.reasoning, sizes.answer)
        )
        history = np.concatenate([history, user])
        completion = np.concatenate([reasoning, answer])
        samples.append(Sample.from_prompt_and_completion(history, completion, index))
        history = np.concatenate([history, completion if keep else answer])
    return samples
