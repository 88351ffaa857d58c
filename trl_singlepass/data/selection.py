"""Which turns of a conversation are trained, to trade cost for coverage."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ..trees.sample import Sample


_FORMS = "'all', 'last', a number n for the first n, or 'sample:n' for n drawn at random"


def parse_train_turns(train_turns: str | int) -> tuple[str, int]:
    """
    Return a choice of turns as its kind and number.

    Args:
        train_turns (`str` or `int`):
            `"all"`, `"last"`, `n` for the first `n`, or `"sample:n"` for `n` drawn at random.

    Returns:
        `tuple[str, int]`: `"all"`, `"last"`, `"first"` or `"sample"`, and `n` (0 where it has none).

    Raises:
        `ValueError`: If it is none of these.
    """
    text = str(train_turns)
    if text in ("all", "last"):
        return text, 0
    found = re.fullmatch(r"(sample:)?([1-9]\d*)", text)
    if not found or isinstance(train_turns, bool):
        raise ValueError(f"train_turns={train_turns!r} is none of {_FORMS}.")
    return "sample" if found[1] else "first", int(found[2])


def select_turns(
    samples: Sequence[Sample], train_turns: str | int, *, seed: int = 0, row_index: int = 0
) -> list[Sample]:
    """
    Return the samples of the turns that are trained, in the order of the conversation.

    Args:
        samples (`Sequence[Sample]`):
            Samples of one conversation.
        train_turns (`str` or `int`):
            `"all"`, `"last"`, `n` for the first `n`, or `"sample:n"` for `n` drawn at random.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        row_index (`int`, *optional*, defaults to `0`):
            Position of the conversation in its dataset: with the seed, it decides the draw.

    Returns:
        `list[Sample]`: The chosen samples.

    Raises:
        `ValueError`: If `train_turns` is of no known form.
    """
    kind, number = parse_train_turns(train_turns)
    if kind == "all":
        return list(samples)
    if kind == "last":
        return list(samples[-1:])
    if kind == "first":
        return list(samples[:number])
    chosen = np.random.default_rng((seed, row_index)).permutation(len(samples))[:number]
    return [samples[index] for index in sorted(chosen)]
