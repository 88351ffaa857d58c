"""
Logs of Anthropic's Messages API.

Source: https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from ...rendering.conversation import Message
from .bad_lines import BadLines, LogError
from .exchange import get_exchange
from .fields import get_list, get_object, get_objects, get_text, join_text, require
from .messages import assistant_message, function_tool, tool_call, tool_message
from .requests import Json, LoggedRequest, LogLine, parse_each_line


_ENDED = ("end_turn", "tool_use")
# The order in which chat templates render the parts of a message.
_ORDER = {"thinking": 0, "redacted_thinking": 0, "text": 1, "tool_use": 2}


def parse(lines: Iterable[LogLine], bad_lines: BadLines) -> Iterator[LoggedRequest]:
    """Yield each response with the messages that were sent."""
    return parse_each_line(lines, bad_lines, _parse_line)


def _parse_line(line: LogLine) -> list[LoggedRequest]:
    request, response = get_exchange(line)
    system = join_text(request.get("system"), ("text",), "the system prompt")
    context: list[Message] = [{"role": "system", "content": system}] if system else []
    require(request.get("messages"), "messages")
    sent = get_objects(request, "messages")
    if sent and sent[-1].get("role") == "assistant":
        raise LogError("The request ends in an assistant message, which the reply continues.")
    for message in sent:
        context += read_message(message)
    check_ended(response)
    require(get_list(response, "content"), "content")
    reply, hidden = read_assistant(get_objects(response, "content"))
    tools = [_read_tool(tool) for tool in get_objects(request, "tools")] or None
    return [LoggedRequest(line.place, context, reply, tools, has_hidden_reasoning=hidden)]


def check_ended(message: Json) -> None:
    """Refuse a reply that did not end by itself: it would be trained as if the model had meant to stop there."""
    reason = message.get("stop_reason")
    if reason not in _ENDED:
        raise LogError(f"The reply did not end: its stop_reason is '{reason}', expected 'end_turn' or 'tool_use'.")


def read_message(message: Json) -> list[Message]:
    """
    Return a message of the Messages API in the form of [`LoggedRequest`].

    Results of tools become messages of their own. Raises [`LogError`] if it holds something else than text, thinking,
    and calls and results of tools.
    """
    role, content = require(get_text(message, "role"), "role"), require(message.get("content"), "content")
    if role == "assistant":
        text = [{"type": "text", "text": content}]
        return [read_assistant(text if isinstance(content, str) else get_objects(message, "content"))[0]]
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    blocks = get_objects(message, "content")
    messages: list[Message] = []
    for is_result, group in groupby(blocks, lambda block: block.get("type") == "tool_result"):
        if is_result:
            messages += map(_read_result, group)
        else:
            messages.append({"role": role, "content": join_text(list(group), ("text",), f"a '{role}' message")})
    return messages


def read_assistant(blocks: list[Json]) -> tuple[Message, bool]:
    """
    Return an assistant's content blocks as one message, and whether it has reasoning in encrypted form only.

    Raises [`LogError`] if a block is something else than thinking, text and tool use, or if chat templates render them
    in another order.
    """
    kinds = [require(get_text(block, "type"), "type") for block in blocks]
    unknown = [kind for kind in kinds if kind not in _ORDER]
    if unknown:
        raise LogError(f"An assistant message has a block of type '{unknown[0]}', which no chat template renders.")
    places = [_ORDER[kind] for kind in kinds]
    if places != sorted(places):
        raise LogError(
            f"An assistant message has blocks in the order {', '.join(kinds)}; chat templates render reasoning, then "
            "text, then tool calls."
        )
    thoughts = [block["thinking"] for block in blocks if get_text(block, "thinking")]
    if len(thoughts) > 1:
        raise LogError("An assistant message has several thinking blocks; chat templates render one reasoning.")
    texts = [block for block in blocks if block["type"] == "text"]
    calls = [
        tool_call(block.get("name"), get_object(block, "input"), block.get("id"))
        for block in blocks
        if block["type"] == "tool_use"
    ]
    content = join_text(texts, ("text",), "an assistant message") if texts else None
    # Thinking that the API withholds is a block with a signature and no text, or a redacted one.
    hidden = 0 in places and not thoughts
    return assistant_message(content, thoughts[0] if thoughts else None, calls), hidden


def _read_result(block: Json) -> Message:
    content = join_text(block.get("content"), ("text",), "the result of a tool")
    return tool_message(content or "", block.get("tool_use_id"))


def _read_tool(tool: Json) -> Json:
    if tool.get("type") not in (None, "custom"):
        raise LogError(f"The tool '{tool.get('name')}' of type '{tool['type']}' has no schema in the log.")
    return function_tool(tool.get("name"), tool.get("description"), get_object(tool, "input_schema"))
