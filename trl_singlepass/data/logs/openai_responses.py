"""
Logs of OpenAI's Responses API.

The API has an item for each part of a reply: its reasoning, its text, each of its calls. Chat templates read them as
one assistant message:

    reasoning, message, function_call, function_call, function_call_output, function_call_output
    → assistant (reasoning, content, two calls), tool, tool

Source: https://platform.openai.com/docs/api-reference/responses and `…/responses-streaming`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from ...rendering.conversation import Message
from .files import Spool, dump
from .lines import (
    BadLines,
    Json,
    LogError,
    LoggedRequest,
    LogLine,
    Place,
    assistant_message,
    function_tool,
    get,
    get_objects,
    given,
    join_text,
    need,
    require,
    tool_call,
    unknown_stream,
)


# What the server adds to the context, and the log lacks.
_UNTRAINABLE = ("conversation", "prompt")
# Schema of a tool that takes free text.
_TEXT_INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
_TEXT = ("input_text", "output_text", "text")
_Find = Callable[[str], tuple[Json, Json] | None]  # an exchange by the id of its response
_PARTS = ("reasoning_content", "content", "tool_calls")  # in the order in which chat templates render them


def read_lines(lines: Iterable[LogLine], bad_lines: BadLines) -> Iterator[LoggedRequest]:
    """Yield each response with the messages that were sent, those of earlier responses that it refers to included."""
    spool, exchanges = Spool(), list[tuple[Place, int]]()
    by_id: dict[str, int] = {}
    for line in lines:
        with bad_lines.at(line.place):
            request, response = line.get_exchange(join_events)
            exchanges.append((line.place, spool.add(dump([request, response, line.get_conversation(request)]))))
            if response.get("id"):
                by_id[str(response["id"])] = exchanges[-1][1]

    def find(response_id: str) -> tuple[Json, Json] | None:
        return spool.read(by_id[response_id])[:2] if response_id in by_id else None

    for place, exchange in exchanges:
        with bad_lines.at(place):
            request, response, conversation = spool.read(exchange)
            yield replace(_read_exchange(place, request, response, find), conversation=conversation)


def _read_exchange(place: Place, request: Json, response: Json, find: _Find) -> LoggedRequest:
    untrainable = [key for key in _UNTRAINABLE if request.get(key)]
    if untrainable:
        raise LogError(f"The request has '{untrainable[0]}', so a part of its context is not in the log.")
    status = response.get("status")
    if status != "completed":
        reason = (get(response, "incomplete_details", dict) or {}).get("reason")
        raise LogError(f"The reply did not end: its status is '{status}'" + (f" ('{reason}')." if reason else "."))
    reply, hidden = read_reply(get_objects(response, "output"))
    instructions = get(request, "instructions", str)  # those of earlier requests do not carry over
    context: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
    context += read_items(_get_items(request, find))
    tools = [_read_tool(tool) for tool in get_objects(request, "tools")] or None
    kwargs = given(reasoning_effort=(get(request, "reasoning", dict) or {}).get("effort"))
    return LoggedRequest(place, context, reply, tools, kwargs, hidden)


def _get_items(request: Json, find: _Find) -> list[Json]:
    """Return the items of a request's context, from the first request of its chain."""
    parts, seen = [_get_input(request)], set()
    while (previous := request.get("previous_response_id")) is not None:
        earlier = find(str(previous))
        if earlier is None or previous in seen:
            raise LogError(f"Its previous_response_id '{previous}' is not in the log, so its context is unknown.")
        seen.add(previous)
        request, response = earlier
        parts.append([*_get_input(request), *get_objects(response, "output")])
    return [item for part in reversed(parts) for item in part]


def _get_input(request: Json) -> list[Json]:
    sent = require(request.get("input"), "input")
    return [{"role": "user", "content": sent}] if isinstance(sent, str) else get_objects(request, "input")


def _read_tool(tool: Json) -> Json:
    if tool.get("type") == "custom":
        return function_tool(tool.get("name"), tool.get("description"), _TEXT_INPUT)
    if tool.get("type") != "function":
        raise LogError(f"A tool has the type '{tool.get('type')}', and its schema is not in the log.")
    return function_tool(tool.get("name"), tool.get("description"), get(tool, "parameters", dict))


def join_events(events: list[Json]) -> Json:
    """Return the response of a stream, which its last event holds."""
    ends = ("response.completed", "response.incomplete", "response.failed")
    whole = [event for event in events if event.get("type") in ends]
    if not whole:
        raise unknown_stream(events)
    return need(whole[-1], "response", dict)


# Items ---------------------------------------------------------------------------------------------------------------


def read_items(items: Iterable[Json]) -> list[Message]:
    """Return items of a request or a response as messages; encrypted reasoning leaves no trace in them."""
    messages: list[Message] = []
    for item in items:
        add_item(messages, item)
    return messages


def add_item(messages: list[Message], item: Json) -> None:
    """Add an item to messages, to the last one if it is a part of the same reply."""
    message = _read_item(item)
    if message is None:
        return
    if message["role"] == "assistant" and messages and _goes_on(messages[-1], message):
        last = messages.pop()
        calls = [*last.get("tool_calls", []), *message.get("tool_calls", [])]
        content = last.get("content", message.get("content"))
        message = assistant_message(content, last.get("reasoning_content"), calls)
    messages.append(message)


def read_reply(items: list[Json]) -> tuple[Message, bool]:
    """Return the items of a reply as one message, and whether it has reasoning in encrypted form only."""
    messages = read_items(items)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        kinds = ", ".join(map(_get_kind, items)) or "none"
        raise LogError(
            f"The reply has items in the order {kinds}; chat templates render reasoning, then text, then tool calls."
        )
    hidden = "reasoning_content" not in messages[0] and any(item.get("type") == "reasoning" for item in items)
    return messages[0], hidden


def is_reply_item(item: Json) -> bool:
    """Return whether the model wrote an item."""
    kind = _get_kind(item)
    return kind in ("reasoning", "function_call", "custom_tool_call") or (
        kind == "message" and item.get("role") == "assistant"
    )


def _get_kind(item: Json) -> str:
    return str(item.get("type") or "message")  # messages may leave theirs out


def _goes_on(last: Message, message: Message) -> bool:
    if last["role"] != "assistant":
        return False
    latest = max((_PARTS.index(key) for key in _PARTS if key in last), default=-1)
    first = min(_PARTS.index(key) for key in _PARTS if key in message)
    return first > latest or first == latest == _PARTS.index("tool_calls")


def _read_item(item: Json) -> Message | None:
    match _get_kind(item):
        case "message":
            role = need(item, "role", str)
            content = join_text(item.get("content"), f"a '{role}' message", _TEXT)
            if role == "assistant":
                return assistant_message(require(content, "content"))
            return {"role": role, "content": content}
        case "reasoning":
            thought = join_text(get_objects(item, "content"), "a reasoning item", ("reasoning_text", "text"))
            return assistant_message(None, thought) if thought else None
        case "function_call":
            if item.get("namespace"):
                raise LogError(f"A call is in the namespace '{item['namespace']}', which no chat template renders.")
            arguments = get(item, "arguments", str)
            return assistant_message(None, None, [tool_call(item.get("name"), arguments, item.get("call_id"))])
        case "custom_tool_call":  # takes free text
            text = {"input": need(item, "input", str)}
            return assistant_message(None, None, [tool_call(item.get("name"), text, item.get("call_id"))])
        case "function_call_output" | "custom_tool_call_output":
            output = item.get("output")
            if isinstance(output, dict):  # of older versions of Codex
                output = output.get("content")
            content = require(join_text(output, "the result of a tool", _TEXT), "output")
            return given(role="tool", content=content, tool_call_id=item.get("call_id"))
        case kind:
            raise LogError(f"An item has the type '{kind}', which no chat template renders.")
