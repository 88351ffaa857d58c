"""One conversation to its rows: render, fit, merge, split; what is lost on the way is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..rendering.conversation import Conversation
from ..rendering.history import render_with_history
from ..rendering.prefixes import Prefixes
from ..rendering.samples import render_conversation
from ..trees.prefix_tree import PrefixTree
from ..trees.rows import ROW_COLUMNS, Row
from ..trees.sample import CompletionKind, Sample
from ..trees.splitting import split_samples
from .bad_rows import BadRowError, reason_of
from .overlong import FittedSamples, OverlongTurnError, fit_samples
from .selection import select_turns
from .settings import RowSettings
from .tokenized_turns import samples_of_turns, turns_in
from .weights import message_weights, weigh


# Columns that count the turns of a conversation by how their completions came about.
KIND_COLUMNS = {kind: f"num_{kind.name.lower()}_turns" for kind in CompletionKind}
COUNT_COLUMNS = (
    "conversation",
    "num_turns",
    "num_turns_without_prompt",
    *KIND_COLUMNS.values(),
    "num_unselected_turns",
    "num_trained_tokens",
    "num_cut_turns",
    "num_dropped_turns",
    "num_cut_tokens",
    "overlong_message",
    "overlong_length",
    "num_sample_tokens",
    "num_repeated_tokens",
)


def samples_of(
    example: Mapping[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    *,
    prefixes: Prefixes | None = None,
) -> FittedSamples:
    """
    Return the samples of one dataset row that are trained.

    Args:
        example (`Mapping[str, Any]`):
            Dataset row.
        index (`int`):
            Its index, for error messages.
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        settings (`RowSettings`):
            Bounds.
        prefixes ([`Prefixes`], *optional*):
            The beginnings of the row's conversation, where they are at hand.

    Returns:
        `FittedSamples`: The samples, and what was lost.

    Raises:
        `BadRowError`: If the row cannot be rendered without losing part of a turn.
        `OverlongTurnError`: If a turn is too long, and none may be.
    """
    try:
        given, weights, num_turns = _turns_of(example, tokenizer, settings, prefixes)
        given = [replace(sample, turn_index=turn) for turn, sample in enumerate(given)]
        chosen = select_turns(given, settings.train_turns, seed=settings.seed, row_index=index)
        chosen = [sample for sample in chosen if weights[sample.message_index or 0] > 0]
        fitted = fit_samples(chosen, settings.longest_sample, settings.overlong_turns)
    except OverlongTurnError as error:
        raise OverlongTurnError(f"Row {index}: {error}") from error
    except AssertionError:
        raise
    except Exception as error:  # a row can be anything, and templates raise what they like
        raise BadRowError(f"Row {index}: {reason_of(error)}") from error
    weighed = weigh(
        fitted.samples,
        [weights[sample.message_index or 0] for sample in fitted.samples],
        loss_reduction=settings.loss_reduction,
        reasoning_weight=settings.reasoning_weight,
    )
    return replace(
        fitted,
        samples=tuple(weighed),
        num_unselected_turns=len(given) - len(chosen),
        num_turns_without_prompt=num_turns - len(given),
        kinds=Counter(sample.kind for sample in given),
    )


def _turns_of(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, settings: RowSettings, prefixes: Prefixes | None
) -> tuple[list[Sample], list[float], int]:
    """Samples of a row, the weight of each message (or of each turn that is tokens already), the number of turns."""
    turns = turns_in(example)
    if turns is not None:
        return samples_of_turns(turns, len(tokenizer)), message_weights(turns), len(turns)
    conversation = Conversation.from_example(dict(example))
    history = example.get("history") or settings.history
    weights = message_weights(conversation.messages)
    if prefixes is not None and history == "template":
        samples = render_conversation(conversation, tokenizer, prefixes=prefixes)
    else:
        samples = render_with_history(conversation, tokenizer, history)
    return samples, weights, len(conversation.turns)


def rows_of(
    example: Mapping[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, settings: RowSettings
) -> tuple[list[Row], list[dict[str, int]]]:
    """
    Return the rows of one conversation: one, or several where its tree is larger than a row.

    Args:
        example (`Mapping[str, Any]`):
            Dataset row.
        index (`int`):
            Its index.
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        settings (`RowSettings`):
            Bounds.

    Returns:
        `tuple[list[Row], list[dict[str, int]]]`: The rows, and `COUNT_COLUMNS` for each: the conversation's counts
        beside its first row, zeros beside the others. Of a conversation of which nothing is trained, an empty row.

    Raises:
        `BadRowError` or `OverlongTurnError`: As [`samples_of`].
    """
    fitted = samples_of(example, index, tokenizer, settings)
    samples = list(fitted.samples)
    trees = [PrefixTree.from_samples(part) for part in split_samples(samples, settings.max_row_tokens) if part]
    rows = [Row.from_tree(tree) for tree in trees] or [_empty_row()]
    counts = _counts(index, fitted)
    counts["num_sample_tokens"] = sum(map(len, samples))
    if len(trees) > 1:
        counts["num_repeated_tokens"] = sum(map(len, trees)) - len(PrefixTree.from_samples(samples))
    return rows, [counts, *(_no_counts(index) for _ in rows[1:])]


def _counts(index: int, fitted: FittedSamples) -> dict[str, int]:
    first = fitted.overlong[:1]
    return {
        "conversation": index,
        "num_turns": len(fitted.samples) + fitted.num_dropped_turns + fitted.num_unselected_turns,
        "num_turns_without_prompt": fitted.num_turns_without_prompt,
        **{column: fitted.kinds[kind] for kind, column in KIND_COLUMNS.items()},
        "num_unselected_turns": fitted.num_unselected_turns,
        "num_trained_tokens": fitted.num_trained_tokens,
        "num_cut_turns": fitted.num_cut_turns,
        "num_dropped_turns": fitted.num_dropped_turns,
        "num_cut_tokens": fitted.num_cut_tokens,
        "overlong_message": next((-1 if s.message_index is None else s.message_index for s in first), -1),
        "overlong_length": sum(map(len, first)),
        "num_sample_tokens": 0,
        "num_repeated_tokens": 0,
    }


def no_rows(index: int) -> tuple[list[Row], list[dict[str, int]]]:
    """Return what [`rows_of`] returns, of a row that cannot be read."""
    return [_empty_row()], [_no_counts(index)]


def _no_counts(index: int) -> dict[str, int]:
    return {**dict.fromkeys(COUNT_COLUMNS, 0), "conversation": index, "overlong_message": -1}


def _empty_row() -> Row:
    return Row.from_columns({name: [] for name in ROW_COLUMNS})
