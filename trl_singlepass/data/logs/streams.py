"""
Streamed responses, put together as the same server would have sent them whole.

Sources: https://platform.openai.com/docs/api-reference/chat-streaming,
https://platform.openai.com/docs/api-reference/responses-streaming,
https://docs.anthropic.com/en/docs/build-with-claude/streaming and, for the format of the text,
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from .bad_lines import LogError
from .fields import get_object, get_objects, require


Json: TypeAlias = dict[str, Any]

_SSE = ("data:", "event:", "id:", ":")
_DONE = "[DONE]"
_KNOWN = "Chat Completions, Responses or Messages API"


def is_stream(value: object) -> bool:
    """Return whether a logged response is a stream: a list of its events, or their text as the server sent it."""
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith((*_SSE, "[")))


def join_stream(value: str | Sequence[object]) -> Json:
    """
    Return the response that the events of a stream add up to, in the form that the API has without streaming.

    Events are objects or text: server-sent events, or JSON. What a stream that broke off lacks is missing here too,
    such as the reason why the reply ended. Raises [`LogError`] if an event is not JSON, or the stream is not that of a
    known API.
    """
    events = _read_text(value) if isinstance(value, str) else [event for item in value for event in _read_item(item)]
    if not events:
        raise LogError("The streamed response has no events.")
    failed = [event for event in events if event.get("error")]
    if failed:
        return {"error": failed[0]["error"]}
    kinds = [str(event.get("type") or event.get("object")) for event in events]
    if "choices" in events[0]:
        return _join_chunks(events)
    if kinds[0] == "message_start":
        return _join_message(events)
    whole = [event for event, kind in zip(events, kinds, strict=True) if kind.startswith("response.") and _ends(event)]
    if whole:  # the last event of a Responses stream holds the response
        return require(get_object(whole[-1], "response"), "response")
    raise LogError(f"The streamed response has events of the type '{kinds[0]}' and no end: not those of a {_KNOWN}.")


def _ends(event: Json) -> bool:
    return event["type"] in ("response.completed", "response.incomplete", "response.failed")


# Events --------------------------------------------------------------------------------------------------------------


def _read_text(text: str) -> list[Json]:
    if text.strip() in ("", _DONE):
        return []
    if not text.lstrip().startswith(_SSE):
        items = _decode(text)
        return [event for item in (items if isinstance(items, list) else [items]) for event in _read_item(item)]
    # An event's data may be on several lines; an empty line ends it.
    parts = text.replace("\r\n", "\n").replace("\r", "\n").split("\n\n")
    lines = [[line[5:].strip() for line in part.split("\n") if line.startswith("data:")] for part in parts]
    data = ["\n".join(part) for part in lines if part]
    return [_as_event(_decode(item)) for item in data if item != _DONE]


def _read_item(item: object) -> list[Json]:
    return _read_text(item) if isinstance(item, str) else [_as_event(item)]


def _as_event(item: object) -> Json:
    if not isinstance(item, dict):
        raise LogError("The streamed response has an event that is no JSON object.")
    data = item.get("data")  # of clients that log the event's name beside it
    return data if isinstance(data, dict) else item


def _decode(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LogError(f"The streamed response has an event that is not JSON: '{text[:40]}'.") from error


# Chat Completions ----------------------------------------------------------------------------------------------------


def _join_chunks(chunks: Iterable[Json]) -> Json:
    response: Json = {}
    choices: dict[int, Json] = {}
    for chunk in chunks:
        response.update({key: value for key, value in chunk.items() if key != "choices" and value is not None})
        for choice in get_objects(chunk, "choices"):
            index = _get_index(choice, 0)
            whole = choices.setdefault(index, {"index": index, "message": {"tool_calls": []}})
            _add_delta(whole["message"], get_object(choice, "delta") or {})
            _append(whole, {key: value for key, value in choice.items() if key not in ("index", "delta", "logprobs")})
    ended = [{**choice, "message": _without_empty_text(choice["message"])} for choice in choices.values()]
    return {**response, "object": "chat.completion", "choices": ended}


def _without_empty_text(message: Json) -> Json:
    """Drop text that only opens a stream: it is null in a whole response, unless the answer itself is empty."""
    answers = {"content"} if not message["tool_calls"] else set()
    return {key: value for key, value in message.items() if value != "" or key in answers}


def _add_delta(message: Json, delta: Json) -> None:
    for call in get_objects(delta, "tool_calls"):
        calls = message["tool_calls"]
        index = _get_index(call, len(calls))  # servers that leave it out send whole calls
        if index > len(calls):
            raise LogError(f"The streamed response has a part of tool call {index}, and no call {len(calls)}.")
        if index == len(calls):
            calls.append({"type": "function", "function": {}})
        function, more = calls[index]["function"], get_object(call, "function") or {}
        calls[index].setdefault("id", call.get("id"))
        function.setdefault("name", more.get("name"))
        _append(function, {"arguments": more.get("arguments")})
    _append(message, {key: value for key, value in delta.items() if key not in ("role", "tool_calls")})


def _get_index(part: Json, default: int) -> int:
    index = part.get("index")
    if not isinstance(index, int | None):
        raise LogError(f"The streamed response has the index '{index}', expected a number.")
    return default if index is None else index


def _append(whole: Json, more: Mapping[str, Any]) -> None:
    """Add to each text and list; what is neither, and reasons of the end, replace what was there."""
    for key, value in more.items():
        if value is None:
            continue
        before = whole.get(key)
        same = isinstance(value, str | list) and type(value) is type(before)
        whole[key] = before + value if same and not key.endswith("_reason") else value


# Messages ------------------------------------------------------------------------------------------------------------


def _join_message(events: Iterable[Json]) -> Json:
    message: Json = {}
    blocks: dict[int, Json] = {}
    for event in events:
        match event.get("type"):
            case "message_start":
                message = require(get_object(event, "message"), "message")
            case "content_block_start":
                blocks[_get_index(event, 0)] = dict(require(get_object(event, "content_block"), "content_block"))
            case "content_block_delta":
                delta = require(get_object(event, "delta"), "delta")
                _append(
                    require(blocks.get(_get_index(event, 0)), "content_block_start"),
                    {key: delta.get(key) for key in ("text", "thinking", "partial_json")},
                )
            case "message_delta":
                message = {**message, **(get_object(event, "delta") or {})}
    return {**message, "content": [_end_block(blocks[index]) for index in sorted(blocks)]}


def _end_block(block: Json) -> Json:
    text = block.pop("partial_json", "")
    return {**block, "input": _decode(text)} if text else block
