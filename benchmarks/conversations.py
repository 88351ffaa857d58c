"""Random conversations of given sizes, as samples: what reasoning models produce, without any text."""

from dataclasses import dataclass

import numpy as np

from trl_singlepass import Sample


@dataclass(frozen=True)
class Sizes:
    """Ranges of the numbers of tokens, both ends included."""

    user: tuple[int, int] = (50, 100)
    reasoning: tuple[int, int] = (300, 1000)
    answer: tuple[int, int] = (100, 200)
    system: int = 50


def conversation(
    turns: int, vocabulary: int, seed: int, sizes: Sizes = Sizes(), *, keep: bool = False
) -> list[Sample]:
    """Samples of one conversation; the reasoning of earlier turns is dropped from the history, or kept."""
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
