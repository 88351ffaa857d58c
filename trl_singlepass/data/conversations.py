"""From one example to its samples and rows: render, select, truncate, weigh, merge, split; count what is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..rendering.conversation import Conversation
from ..rendering.history import render_with_history
from ..rendering.prefixes import Prefixes
from ..rendering.samples import render_conversation, render_requests
from ..trees.errors import DataError
from ..trees.sample import Sample
from .bad_rows import BadRowError, unexpected_error
from .images import check_no_images, take_images
from .reader import ConversationReader, Reader, as_reader, get_tokenizer
from .requests import split_requests
from .rows import KIND_COUNTS, PreparedRow, separate_rows
from .selection import FittedSamples, OverlongTurnError, fit_samples, select_turns
from .settings import RowSettings
from .tokenized_turns import get_tokenized_turns, tokenized_turns_to_samples
from .weights import message_weights, weigh


def example_to_samples(
    example: Mapping[str, object],
    index: int,
    tokenizer: Reader,
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
        rendered, num_turns = _render_turns(example, index, as_reader(tokenizer), settings, prefixes)
        given = [sample.with_turn_index(turn) for turn, (sample, _) in enumerate(rendered)]
        weights = [weight for _, weight in rendered]
        chosen = select_turns(given, settings.train_turns, seed=settings.seed, example_index=index)
        chosen = [sample for sample in chosen if weights[sample.turn_index] > 0]
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
        [weights[sample.turn_index] for sample in fitted.samples],
        loss_reduction=settings.loss_reduction,
        reasoning_weight=settings.reasoning_weight,
    )
    counts = Counter(KIND_COUNTS[sample.kind] for sample in given)
    counts.update(fitted.counts, num_unselected_turns=len(given) - len(chosen))
    counts.update(num_turns=len(given) - len(chosen), num_turns_without_prompt=num_turns - len(given))
    return replace(fitted, samples=tuple(weighed), counts=counts)


def _render_turns(
    example: Mapping[str, object],
    index: int,
    reader: PreTrainedTokenizerBase | ConversationReader,
    settings: RowSettings,
    prefixes: Prefixes | None,
) -> tuple[list[tuple[Sample, float]], int]:
    """Return all samples with the weights of their messages, or of turns that are tokens, and the number of turns."""
    tokenizer, turns = get_tokenizer(reader), get_tokenized_turns(example)
    if turns is not None:
        samples, weights = tokenized_turns_to_samples(turns, len(tokenizer)), message_weights(turns)
        if isinstance(reader, ConversationReader):
            samples = reader.add_images(samples, turns, index)
        return list(zip(samples, weights, strict=True)), len(turns)
    requests = split_requests(example)
    if requests is None:
        return _render_messages(example, index, reader, settings, prefixes)
    conversations: list[Conversation] = []
    factors: list[list[float]] = []
    for number, (request, factor) in enumerate(zip(requests, message_weights(requests, "Request"), strict=True)):
        with _naming_request(number):
            if isinstance(reader, ConversationReader) and take_images(request)[1]:
                raise DataError("It has images. Store it as a row of its own, with 'prompt' and 'completion'.")
            conversations.append(read_conversation(request, index, reader))
            factors.append([factor * weight for weight in message_weights(conversations[-1].messages)])
    histories = [_get_history(request, settings) for request in requests]
    if set(histories) == {"template"}:
        of_requests = render_requests(conversations, tokenizer, get_chat_template(reader))
    else:
        of_requests = []
        for number, (conversation, history) in enumerate(zip(conversations, histories, strict=True)):
            with _naming_request(number):
                of_requests.append(_render(conversation, history, reader))
    rendered = [
        (sample, of_messages[sample.message_index or 0])
        for samples, of_messages in zip(of_requests, factors, strict=True)
        for sample in samples
    ]
    return rendered, sum(len(conversation.turns) for conversation in conversations)


@contextmanager
def _naming_request(number: int) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"Request {number}: {error}") from error


def _render_messages(
    example: Mapping[str, object],
    index: int,
    reader: PreTrainedTokenizerBase | ConversationReader,
    settings: RowSettings,
    prefixes: Prefixes | None,
) -> tuple[list[tuple[Sample, float]], int]:
    history = _get_history(example, settings)
    conversation = read_conversation(example, index, reader)
    weights = message_weights(conversation.messages)
    if prefixes is not None and history == "template":
        samples = render_conversation(conversation, get_tokenizer(reader), prefixes=prefixes)
    else:
        samples = _render(conversation, history, reader)
    return [(sample, weights[sample.message_index or 0]) for sample in samples], len(conversation.turns)


def read_conversation(
    example: Mapping[str, object], index: int, reader: PreTrainedTokenizerBase | ConversationReader
) -> Conversation:
    """Return an example as a conversation, with its images if the reader reads any."""
    if isinstance(reader, ConversationReader):
        return reader.read_conversation(example, index)
    check_no_images(example)
    return Conversation.from_example(dict(example))


def _render(
    conversation: Conversation, history: Any, reader: PreTrainedTokenizerBase | ConversationReader
) -> list[Sample]:
    return render_with_history(conversation, get_tokenizer(reader), history, chat_template=get_chat_template(reader))


def get_chat_template(reader: PreTrainedTokenizerBase | ConversationReader) -> str | None:
    """Return the chat template of a processor; `None` for a tokenizer, which has its own."""
    return reader.chat_template if isinstance(reader, ConversationReader) else None


def _get_history(example: Mapping[str, object], settings: RowSettings) -> Any:
    return example.get("history") or settings.history  # a column may hold anything


def example_to_rows(
    example: Mapping[str, object],
    index: int,
    tokenizer: Reader,
    settings: RowSettings,
) -> list[PreparedRow]:
    """
    Return the rows of one example: one, or several if its tree is larger than a row; an empty one if nothing of it is
    trained. Arguments and errors are those of [`example_to_samples`].
    """
    return separate_rows(example_to_samples(example, index, tokenizer, settings), index, settings.max_row_tokens)
