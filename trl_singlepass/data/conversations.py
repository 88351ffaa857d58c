"""From one example to its samples and rows: render, select, truncate, weigh, merge, split; count what is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..rendering.conversation import Conversation
from ..rendering.history import render_with_history
from ..rendering.prefixes import Prefixes
from ..rendering.samples import render_conversation
from ..trees.errors import DataError
from ..trees.image_features import shown_images
from ..trees.prefix_tree import PrefixTree
from ..trees.rows import ROW_COLUMNS, Row
from ..trees.sample import CompletionKind, Sample
from ..trees.splitting import split_samples
from .bad_rows import BadRowError, unexpected_error
from .images import check_no_images
from .selection import FittedSamples, OverlongTurnError, fit_samples, select_turns
from .settings import RowSettings
from .tokenized_turns import get_tokenized_turns, tokenized_turns_to_samples
from .vision import ConversationReader, as_reader, get_tokenizer
from .weights import message_weights, weigh


# Columns that count a conversation's turns by how their completions came about.
KIND_COLUMNS = {kind: f"num_{kind.name.lower()}_turns" for kind in CompletionKind}
COUNT_COLUMNS = (
    "conversation",
    "num_turns",
    "num_turns_without_prompt",
    *KIND_COLUMNS.values(),
    "num_unselected_turns",
    "num_empty_blocks",
    "num_trained_tokens",
    "num_cut_turns",
    "num_dropped_turns",
    "num_cut_tokens",
    "overlong_message",
    "overlong_length",
    "num_sample_tokens",
    "num_repeated_tokens",
)


IMAGE_COUNT_COLUMNS = ("num_sample_images", "num_row_images")
"""Further counts of datasets with images: how many N-pass encodes, and how many the rows hold."""


def example_to_samples(
    example: Mapping[str, object],
    index: int,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | ConversationReader,
    settings: RowSettings,
    *,
    prefixes: Prefixes | None = None,
) -> FittedSamples:
    """
    Return the samples of one example that are trained, and what was lost.

    The example may have any of the forms that a dataset may hold; one with images needs a processor. `prefixes` are
    those of its conversation, if it has been rendered already.

    Raises `BadRowError` if the conversation cannot be rendered without losing part of a turn, `OverlongTurnError` if a
    turn is too long and none may be, and `UnexpectedError` if anything else goes wrong, which is a fault of the
    package.
    """
    try:
        given, weights, num_turns = _render_turns(example, index, as_reader(tokenizer), settings, prefixes)
        given = [sample.with_turn_index(turn) for turn, sample in enumerate(given)]
        chosen = select_turns(given, settings.train_turns, seed=settings.seed, example_index=index)
        chosen = [sample for sample in chosen if weights[sample.message_index or 0] > 0]
        fitted = fit_samples(chosen, settings.longest_sample, settings.overlong_turns)
    except OverlongTurnError as error:
        raise OverlongTurnError(f"Row {index}: {error}") from error
    except DataError as error:
        raise BadRowError(f"Row {index}: {error}") from error
    except AssertionError:
        raise
    except Exception as error:  # never a bad row: it would be dropped as if the data were at fault
        raise unexpected_error(error, index) from error
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


def _render_turns(
    example: Mapping[str, object],
    index: int,
    reader: PreTrainedTokenizerBase | ConversationReader,
    settings: RowSettings,
    prefixes: Prefixes | None,
) -> tuple[list[Sample], list[float], int]:
    """Return all samples, the weight of each message (of each turn if turns are tokens), and the number of turns."""
    tokenizer, turns = get_tokenizer(reader), get_tokenized_turns(example)
    if turns is not None:
        samples, weights = tokenized_turns_to_samples(turns, len(tokenizer)), message_weights(turns)
        if isinstance(reader, ConversationReader):
            samples = reader.add_images(samples, turns, index)
        return samples, weights, len(turns)
    if isinstance(reader, ConversationReader):
        conversation, chat_template = reader.read_conversation(example, index), reader.chat_template
    else:
        check_no_images(example)
        conversation, chat_template = Conversation.from_example(dict(example)), None
    history: Any = example.get("history") or settings.history  # a column may hold anything
    weights = message_weights(conversation.messages)
    if prefixes is not None and history == "template":
        samples = render_conversation(conversation, tokenizer, prefixes=prefixes)
    else:
        samples = render_with_history(conversation, tokenizer, history, chat_template=chat_template)
    return samples, weights, len(conversation.turns)


def example_to_rows(
    example: Mapping[str, object],
    index: int,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | ConversationReader,
    settings: RowSettings,
) -> tuple[list[Row], list[dict[str, int]]]:
    """
    Return the rows of one example: one, or several if its tree is larger than a row.

    Arguments and errors are those of [`example_to_samples`].

    `COUNT_COLUMNS` and `IMAGE_COUNT_COLUMNS` are returned for each row: the conversation's counts beside its first
    row, zeros beside the others. A conversation of which nothing is trained has one empty row.
    """
    fitted = example_to_samples(example, index, tokenizer, settings)
    samples = list(fitted.samples)
    trees = [PrefixTree.from_samples(part) for part in split_samples(samples, settings.max_row_tokens) if part]
    rows = [Row.from_tree(tree) for tree in trees] or [_empty_row()]
    counts = _counts(index, fitted)
    counts["num_sample_tokens"] = sum(map(len, samples))
    counts["num_sample_images"] = sum(len(shown_images(sample.image_features, sample.images)) for sample in samples)
    counts["num_row_images"] = sum(len(row.images) for row in rows)
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
        "num_empty_blocks": fitted.num_empty_blocks,
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
    """Return, for an example that cannot be read, what [`example_to_rows`] returns for others."""
    return [_empty_row()], [_no_counts(index)]


def _no_counts(index: int) -> dict[str, int]:
    return {**dict.fromkeys((*COUNT_COLUMNS, *IMAGE_COUNT_COLUMNS), 0), "conversation": index, "overlong_message": -1}


def _empty_row() -> Row:
    return Row.from_columns({name: [] for name in ROW_COLUMNS})
