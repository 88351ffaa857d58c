"""What a log holds, in whatever format: requests with their replies, as messages or as tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...rendering.conversation import Message
from .bad_lines import BadLines, LogError, Place


Json = dict[str, Any]
Logged = TypeVar("Logged")


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a log."""

    place: Place
    entry: Json  # the JSON object on it


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """
    A request to a model and one reply to it.

    Content of messages is text, reasoning is under `reasoning_content`, and arguments of tool calls are JSON.
    """

    place: Place  # where the reply is in the log
    context: list[Message]  # the messages that were sent
    reply: Message  # the assistant message that came back
    tools: list[Json] | None = None  # JSON schemas of the tools that were sent
    chat_template_kwargs: Json = field(default_factory=dict)  # arguments of the chat template that were sent
    has_hidden_reasoning: bool = False  # the log holds reasoning of the reply only in encrypted form
    # a subagent sent it, whose system prompt and tools are not those of the main conversation
    is_side_chain: bool = False
    # attachments were left out of the context, because the log does not hold how they were worded
    has_skipped_attachments: bool = False


@dataclass(frozen=True, slots=True)
class LoggedTokens:
    """A request and its reply as the tokens that an inference server read and wrote."""

    place: Place  # where the reply is in the log
    prompt_ids: list[int]
    completion_ids: list[int]
    conversation_id: str | None = None  # conversation that it belongs to, where the log tells


def parse_each_line(
    lines: Iterable[LogLine], bad_lines: BadLines, parse_line: Callable[[LogLine], list[Logged]]
) -> Iterator[Logged]:
    """
    Parse a log whose lines do not depend on each other.

    A line is taken whole or not at all: `bad_lines` takes those that `parse_line` refuses.
    """
    for line in lines:
        try:
            parsed = parse_line(line)
        except LogError as error:
            bad_lines.add(line.place, str(error))
            continue
        yield from parsed
