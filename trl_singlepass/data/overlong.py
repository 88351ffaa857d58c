"""Turns longer than what can be trained: cut, dropped or refused, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..rendering.conversation import RenderingError
from ..trees.sample import CompletionKind, Sample
from .settings import OverlongTurns


class OverlongTurnError(RenderingError):
    """A turn is too long, and none may be: its row is not bad, so no setting drops it."""


@dataclass(frozen=True, slots=True)
class FittedSamples:
    """
    Samples of one conversation that are short enough to train, and what was lost on the way.

    Args:
        samples (`tuple[Sample, ...]`):
            Samples with at least one trained token left.
        overlong (`tuple[Sample, ...]`):
            Samples as they were that lost a trained token, or all of them.
        num_trained_tokens (`int`):
            Trained tokens of `samples`.
        num_cut_turns (`int`):
            Turns that lost part of their completion.
        num_dropped_turns (`int`):
            Turns of which nothing is trained.
        num_cut_tokens (`int`):
            Trained tokens that were lost.
        num_unselected_turns (`int`, *optional*, defaults to 0):
            Turns that are context only, by their weight or by `train_turns`.
        num_turns_without_prompt (`int`, *optional*, defaults to 0):
            Assistant messages that open a conversation, so that no prompt leads to them: they are context only.
        kinds (`Counter[CompletionKind]`, *optional*):
            All turns of the conversation, by how their completions came about.
    """

    samples: tuple[Sample, ...]
    overlong: tuple[Sample, ...]
    num_trained_tokens: int
    num_cut_turns: int
    num_dropped_turns: int
    num_cut_tokens: int
    num_unselected_turns: int = 0
    num_turns_without_prompt: int = 0
    kinds: Counter[CompletionKind] = field(default_factory=Counter)


def fit_samples(samples: Sequence[Sample], limit: int | None, overlong_turns: OverlongTurns) -> FittedSamples:
    """
    Return samples with at most `limit` tokens each.

    Args:
        samples (`Sequence[Sample]`):
            Samples of one conversation.
        limit (`int`, *optional*):
            Longest sample, in tokens; `None` keeps every sample whole.
        overlong_turns (`str`):
            What happens to longer ones: `"truncate"` keeps their first `limit` tokens, `"drop"` leaves them out,
            `"error"` refuses them.

    Returns:
        `FittedSamples`: The samples and what was lost. Trained tokens in = trained tokens + lost tokens.

    Raises:
        `OverlongTurnError`: If a sample is too long and `overlong_turns="error"`.
    """
    trained = [(sample, _fitted(sample, limit, overlong_turns)) for sample in samples if sample.is_trained]
    kept = [fitted for _, fitted in trained if fitted is not None]
    losses = [
        (sample, fitted is None, _trained_tokens(sample) - (_trained_tokens(fitted) if fitted else 0))
        for sample, fitted in trained
    ]
    return FittedSamples(
        samples=tuple(kept),
        overlong=tuple(sample for sample, _, lost in losses if lost > 0),
        num_trained_tokens=sum(map(_trained_tokens, kept)),
        num_cut_turns=sum(lost > 0 and not is_dropped for _, is_dropped, lost in losses),
        num_dropped_turns=sum(is_dropped for _, is_dropped, _ in losses),
        num_cut_tokens=sum(lost for _, _, lost in losses),
    )


def _fitted(sample: Sample, limit: int | None, overlong_turns: OverlongTurns) -> Sample | None:
    if limit is None or len(sample) <= limit:
        return sample
    if overlong_turns == "error":
        where = "" if sample.message_index is None else f" at message {sample.message_index}"
        raise OverlongTurnError(
            f"The turn{where} has {len(sample)} tokens with its context, {limit} are allowed. Raise max_length and "
            "max_row_tokens, where they are set, or choose overlong_turns='truncate' or 'drop'."
        )
    if overlong_turns == "drop":
        return None
    cut = sample.truncated(limit)
    return cut if cut.is_trained else None


def _trained_tokens(sample: Sample) -> int:
    return int((sample.loss_weights > 0).sum())
