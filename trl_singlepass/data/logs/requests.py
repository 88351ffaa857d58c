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
    """
    A line of a log.

    Args:
        place ([`Place`]):
            File and line number.
        entry (`dict`):
            The JSON object on it.
    """

    place: Place
    entry: Json


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """
    A request to a model and one reply to it.

    Args:
        place ([`Place`]):
            Where the reply is in the log.
        context (`list[dict]`):
            The messages that were sent. Their content is text, their reasoning is under `reasoning_content`, the
            arguments of their tool calls are JSON.
        reply (`dict`):
            The assistant message that came back, in the same form.
        tools (`list[dict]`, *optional*):
            JSON schemas of the tools that were sent.
        chat_template_kwargs (`dict`, *optional*):
            Arguments of the chat template that were sent.
        has_hidden_reasoning (`bool`, *optional*, defaults to `False`):
            Whether the log holds reasoning of the reply only in encrypted form.
        is_side_chain (`bool`, *optional*, defaults to `False`):
            Whether a subagent sent it, whose system prompt and tools are not those of the main conversation.
        has_skipped_attachments (`bool`, *optional*, defaults to `False`):
            Whether attachments were left out of the context, because the log does not hold how they were worded.
    """

    place: Place
    context: list[Message]
    reply: Message
    tools: list[Json] | None = None
    chat_template_kwargs: Json = field(default_factory=dict)
    has_hidden_reasoning: bool = False
    is_side_chain: bool = False
    has_skipped_attachments: bool = False


@dataclass(frozen=True, slots=True)
class LoggedTokens:
    """
    A request and its reply as the tokens that an inference server read and wrote.

    Args:
        place ([`Place`]):
            Where the reply is in the log.
        prompt_ids (`list[int]`):
            Tokens of the prompt.
        completion_ids (`list[int]`):
            Tokens of the reply.
        conversation_id (`str`, *optional*):
            Conversation that it belongs to, where the log tells.
    """

    place: Place
    prompt_ids: list[int]
    completion_ids: list[int]
    conversation_id: str | None = None


def parse_each_line(
    lines: Iterable[LogLine], bad_lines: BadLines, parse_line: Callable[[LogLine], list[Logged]]
) -> Iterator[Logged]:
    """
    Parse a log whose lines do not depend on each other.

    Args:
        lines (`Iterable[LogLine]`):
            The lines.
        bad_lines ([`BadLines`]):
            Takes the lines that `parse_line` refuses.
        parse_line (`Callable`):
            Function of a line. A line is taken whole or not at all.

    Yields:
        What `parse_line` returns.
    """
    for line in lines:
        try:
            parsed = parse_line(line)
        except LogError as error:
            bad_lines.add(line.place, str(error))
            continue
        yield from parsed
