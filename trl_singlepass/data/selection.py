"""Which turns of a conversation are trained, and what happens to those that are too long."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from ..rendering.conversation import RenderingError
from ..trees.sample import CompletionKind, Sample


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
    """Samples of one conversation that are short enough to train, and what was lost on the way."""

    samples: tuple[Sample, ...]  # those that still have a trained token
    overlong: tuple[Sample, ...]  # samples that lost trained tokens, as they were before
    num_trained_tokens: int  # in `samples`
    num_cut_turns: int  # lost part of their completion
    num_dropped_turns: int  # nothing of them is trained
    num_cut_tokens: int  # trained tokens that were lost
    num_unselected_turns: int = 0  # context only, by their weight or by `train_turns`
    # assistant messages that open a conversation: no prompt leads to them, so they are context only
    num_turns_without_prompt: int = 0
    # all turns of the conversation, by how their completions came about
    kinds: Counter[CompletionKind] = field(default_factory=Counter)

    @property
    def num_empty_blocks(self) -> int:
        """Trained turns that begin with an empty block of reasoning."""
        return sum(sample.has_empty_block for sample in self.samples)


def fit_samples(samples: Sequence[Sample], limit: int | None, overlong_turns: OverlongTurns) -> FittedSamples:
    """
    Return samples with at most `limit` tokens each.

    `None` keeps every sample whole. Trained tokens kept and lost add up to those that were given. Raises
    `OverlongTurnError` if a sample is too long and `overlong_turns="error"`.
    """
    trained = [(sample, _fit(sample, limit, overlong_turns)) for sample in samples if sample.is_trained]
    kept = [fitted for _, fitted in trained if fitted is not None]
    losses = [
        (sample, fitted is None, sample.num_trained_tokens - (fitted.num_trained_tokens if fitted else 0))
        for sample, fitted in trained
    ]
    return FittedSamples(
        samples=tuple(kept),
        overlong=tuple(sample for sample, _, lost in losses if lost > 0),
        num_trained_tokens=sum(sample.num_trained_tokens for sample in kept),
        num_cut_turns=sum(lost > 0 and not is_dropped for _, is_dropped, lost in losses),
        num_dropped_turns=sum(is_dropped for _, is_dropped, _ in losses),
        num_cut_tokens=sum(lost for _, _, lost in losses),
    )


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
