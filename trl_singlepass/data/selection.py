"""Which turns of a conversation are trained, and what happens to those that are too long."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import compress

import numpy as np

from ..rendering.conversation import RenderingError
from ..trees.sample import Sample


_FORMS = "'all', 'last', a number n for the first n, or 'sample:n' for n drawn at random"


class TurnChoice(StrEnum):
    """Which turns of a conversation are trained."""

    ALL = "all"
    FIRST = "first"
    LAST = "last"
    SAMPLE = "sample"


class OverlongTurns(StrEnum):
    """What happens to a turn that is longer than allowed."""

    TRUNCATE = "truncate"
    """Its first tokens are trained."""
    DROP = "drop"
    """It is left out."""
    ERROR = "error"
    """It is an error."""


class OverlongTurnError(RenderingError):
    """A turn is too long, and none may be. Its row is not a bad one, so no setting drops it."""


def parse_train_turns(train_turns: str | int) -> tuple[TurnChoice, int]:
    """
    Return the setting `train_turns` as a choice and its number.

    The setting is `"all"`, `"last"`, `n` for the first `n`, or `"sample:n"` for `n` drawn at random; any other is a
    `ValueError`. The number is 0 where the choice has none.
    """
    text = str(train_turns)
    if text in (TurnChoice.ALL, TurnChoice.LAST):
        return TurnChoice(text), 0
    found = re.fullmatch(r"(sample:)?([1-9]\d*)", text)
    if not found or isinstance(train_turns, bool):
        raise ValueError(f"train_turns={train_turns!r} is not one of {_FORMS}.")
    return TurnChoice.SAMPLE if found[1] else TurnChoice.FIRST, int(found[2])


def select_turns(
    samples: Sequence[Sample], train_turns: str | int, *, seed: int = 0, example_index: int = 0
) -> list[Sample]:
    """
    Return the samples of the turns that are trained, in the order of the conversation.

    A random choice depends on `seed` and `example_index`, the conversation's index in its dataset, and nothing else.
    `train_turns` is what [`parse_train_turns`] takes.
    """
    choice, number = parse_train_turns(train_turns)
    if choice == TurnChoice.ALL:
        return list(samples)
    if choice == TurnChoice.LAST:
        return list(samples[-1:])
    if choice == TurnChoice.FIRST:
        return list(samples[:number])
    chosen = np.random.default_rng((seed, example_index)).permutation(len(samples))[:number]
    return [samples[index] for index in sorted(chosen)]


@dataclass(frozen=True, slots=True)
class FittedSamples:
    """Samples that are short enough to train, and what was lost on the way."""

    samples: tuple[Sample, ...]  # those that still have a trained token
    overlong: tuple[Sample, ...]  # samples that lost trained tokens, as they were before
    counts: Mapping[str, int]  # what is counted of them and of the turns that are left out (`COUNTS` in `rows.py`)


def fit_samples(samples: Sequence[Sample], limit: int | None, overlong_turns: OverlongTurns) -> FittedSamples:
    """
    Return samples with at most `limit` tokens each, `None` for any number.

    Trained tokens kept and lost add up to those that were given. Raises `OverlongTurnError` if a sample is too long
    and `overlong_turns="error"`.
    """
    trained = [sample for sample in samples if sample.is_trained]
    fitted = [_fit(sample, limit, overlong_turns) for sample in trained]
    kept = [0 if sample is None else sample.num_trained_tokens for sample in fitted]
    lost = [sample.num_trained_tokens - num_kept for sample, num_kept in zip(trained, kept, strict=True)]
    overlong = tuple(compress(trained, lost))
    num_dropped = fitted.count(None)
    counts = {
        "num_turns": len(trained),
        "num_trained_tokens": sum(kept),
        "num_cut_turns": len(overlong) - num_dropped,
        "num_dropped_turns": num_dropped,
        "num_cut_tokens": sum(lost),
    }
    return FittedSamples(tuple(sample for sample in fitted if sample is not None), overlong, counts)


def _fit(sample: Sample, limit: int | None, overlong_turns: OverlongTurns) -> Sample | None:
    if limit is None or len(sample) <= limit:
        return sample
    if overlong_turns == OverlongTurns.ERROR:
        where = "" if sample.message_index is None else f" at message {sample.message_index}"
        raise OverlongTurnError(
            f"The turn{where} has {len(sample)} tokens with its context, {limit} are allowed. Raise max_length and "
            "max_row_tokens, where they are set, or choose overlong_turns='truncate' or 'drop'."
        )
    if overlong_turns == OverlongTurns.DROP:
        return None
    truncated = sample.truncated(limit) if sample.length_of_whole_images(limit) else None
    return truncated if truncated is not None and truncated.is_trained else None
