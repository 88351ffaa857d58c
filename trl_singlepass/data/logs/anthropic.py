"""
Logs of Anthropic's Messages API.

Source: https://docs.anthropic.com/en/api/messages and, for streams, `…/docs/build-with-claude/streaming`
"""

from __future__ import annotations

from itertools import groupby

from ...rendering.conversation import Message
from .lines import (
    Json,
    LogError,
    LoggedRequest,
    LogLine,
    append_delta,
    assistant_message,
    decode_event,
    function_tool,
    get,
    get_index,
    get_objects,
    given,
    join_text,
    need,
    require,
    tool_call,
    unknown_stream,
)


_ENDED = ("end_turn", "tool_use")
# The order in which chat templates render the parts of a message.
_ORDER = {"thinking": 0, "redacted_thinking": 0, "text": 1, "tool_use": 2}


def read_line(line: LogLine) -> list[LoggedRequest]:
    """Return a response with the messages that were sent."""
    return read_exchange(line, *line.get_exchange(join_events))


def read_exchange(line: LogLine, request: Json, response: Json) -> list[LoggedRequest]:
    """Return a response with the messages that were sent."""
    system = join_text(request.get("system"), "the system prompt")
    context: list[Message] = [{"role": "system", "content": system}] if system else []
    require(request.get("messages"), "messages")
    sent = get_objects(request, "messages")
    if sent and sent[-1].get("role") == "assistant":
        raise LogError("The request ends in an assistant message, which the reply continues.")
    for message in sent:
        context += read_message(message)
    reason = response.get("stop_reason")
    if reason not in _ENDED:
        raise LogError(f"The reply did not end: its stop_reason is '{reason}', expected 'end_turn' or 'tool_use'.")
    need(response, "content", list)
    reply, hidden = read_assistant(get_objects(response, "content"))
    tools = [_read_tool(tool) for tool in get_objects(request, "tools")] or None
    return [LoggedRequest(line.place, context, reply, tools, {}, hidden, line.get_conversation(request))]


def read_message(message: Json) -> list[Message]:
    """Return a message of the API, and results of tools as messages of their own."""
    role, content = need(message, "role", str), require(message.get("content"), "content")
    if role == "assistant":
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else get_objects(message, "content")
        return [read_assistant(blocks)[0]]
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    messages: list[Message] = []
    for is_result, group in groupby(get_objects(message, "content"), lambda block: block.get("type") == "tool_result"):
        if is_result:
            for block in group:
                text = join_text(block.get("content"), "the result of a tool")
                messages.append(given(role="tool", content=text or "", tool_call_id=block.get("tool_use_id")))
        else:
            messages.append({"role": role, "content": join_text(list(group), f"a '{role}' message")})
    return messages


def read_assistant(blocks: list[Json]) -> tuple[Message, bool]:
    """Return an assistant's content blocks as one message, and whether it has reasoning in encrypted form only."""
    kinds = [need(block, "type", str) for block in blocks]
    unknown = [kind for kind in kinds if kind not in _ORDER]
    if unknown:
        raise LogError(f"An assistant message has a block of type '{unknown[0]}', which no chat template renders.")
    places = [_ORDER[kind] for kind in kinds]
    if places != sorted(places):
        raise LogError(
            f"An assistant message has blocks in the order {', '.join(kinds)}; chat templates render reasoning, then "
            "text, then tool calls."
        )
    thoughts = [block["thinking"] for block in blocks if get(block, "thinking", str)]
    if len(thoughts) > 1:
        raise LogError("An assistant message has several thinking blocks; chat templates render one reasoning.")
    texts = [block for block in blocks if block["type"] == "text"]
    calls = [
        tool_call(block.get("name"), get(block, "input", dict), block.get("id"))
        for block in blocks
        if block["type"] == "tool_use"
    ]
    content = join_text(texts, "an assistant message") if texts else None
    # Thinking that the API withholds is a block with a signature and no text, or a redacted one.
    hidden = 0 in places and not thoughts
    return assistant_message(content, thoughts[0] if thoughts else None, calls), hidden


def _read_tool(tool: Json) -> Json:
    if tool.get("type") not in (None, "custom"):
        raise LogError(f"The tool '{tool.get('name')}' of type '{tool['type']}' has no schema in the log.")
    return function_tool(tool.get("name"), tool.get("description"), get(tool, "input_schema", dict))


def join_events(events: list[Json]) -> Json:
    """Return the response that the events of a stream add up to."""
    if events[0].get("type") != "message_start":
        raise unknown_stream(events)
    message: Json = {}
    blocks: dict[int, Json] = {}
    for event in events:
        match event.get("type"):
            case "message_start":
                message = need(event, "message", dict)
            case "content_block_start":
                blocks[get_index(event, 0)] = dict(need(event, "content_block", dict))
            case "content_block_delta":
                delta = need(event, "delta", dict)
                append_delta(
                    require(blocks.get(get_index(event, 0)), "content_block_start"),
                    {key: delta.get(key) for key in ("text", "thinking", "partial_json")},
                )
            case "message_delta":
                message = {**message, **(get(event, "delta", dict) or {})}
    for block in blocks.values():
        if text := block.pop("partial_json", ""):
            block["input"] = decode_event(text)
    return {**message, "content": [blocks[index] for index in sorted(blocks)]}
