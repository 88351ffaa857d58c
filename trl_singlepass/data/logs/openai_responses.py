"""
Logs of OpenAI's Responses API.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ...rendering.conversation import Message
from .bad_lines import BadLines, LogError, Place
from .exchange import get_exchange
from .fields import get_object, get_objects, get_text, require
from .messages import function_tool
from .requests import Json, LoggedRequest, LogLine
from .response_items import read_items, read_reply


# What the server adds to the context, and the log lacks.
_UNTRAINABLE = ("conversation", "prompt")
# Schema of a tool that takes free text.
_TEXT_INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


class _Exchange(NamedTuple):
    place: Place
    request: Json
    response: Json


def parse(lines: Iterable[LogLine], bad_lines: BadLines) -> Iterator[LoggedRequest]:
    """Yield each response with the messages that were sent, those of earlier responses that it refers to included."""
    exchanges = []
    for line in lines:
        try:
            exchanges.append(_Exchange(line.place, *get_exchange(line)))
        except LogError as error:
            bad_lines.add(line.place, str(error))
    by_id = {str(exchange.response["id"]): exchange for exchange in exchanges if exchange.response.get("id")}
    for exchange in exchanges:
        try:
            request = _read_exchange(exchange, by_id)
        except LogError as error:
            bad_lines.add(exchange.place, str(error))
            continue
        yield request


def _read_exchange(exchange: _Exchange, by_id: Mapping[str, _Exchange]) -> LoggedRequest:
    place, request, response = exchange
    untrainable = [key for key in _UNTRAINABLE if request.get(key)]
    if untrainable:
        raise LogError(f"The request has '{untrainable[0]}', so a part of its context is not in the log.")
    status = response.get("status")
    if status != "completed":
        reason = (get_object(response, "incomplete_details") or {}).get("reason")
        raise LogError(f"The reply did not end: its status is '{status}'" + (f" ('{reason}')." if reason else "."))
    reply, hidden = read_reply(get_objects(response, "output"))
    instructions = get_text(request, "instructions")  # those of earlier requests do not carry over
    context: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
    context += read_items(_get_items(request, by_id))
    tools = [_read_tool(tool) for tool in get_objects(request, "tools")] or None
    effort = (get_object(request, "reasoning") or {}).get("effort")
    kwargs = {} if effort is None else {"reasoning_effort": effort}
    return LoggedRequest(place, context, reply, tools, kwargs, hidden)


def _get_items(request: Json, by_id: Mapping[str, _Exchange]) -> list[Json]:
    """Return the items of a request's context, from the first request of its chain."""
    parts, seen = [_get_input(request)], set()
    while (previous := request.get("previous_response_id")) is not None:
        if previous not in by_id or previous in seen:
            raise LogError(f"Its previous_response_id '{previous}' is not in the log, so its context is unknown.")
        seen.add(previous)
        request = by_id[previous].request
        parts.append([*_get_input(request), *get_objects(by_id[previous].response, "output")])
    return [item for part in reversed(parts) for item in part]


def _get_input(request: Json) -> list[Json]:
    given = require(request.get("input"), "input")
    return [{"role": "user", "content": given}] if isinstance(given, str) else get_objects(request, "input")


def _read_tool(tool: Json) -> Json:
    if tool.get("type") == "custom":
        return function_tool(tool.get("name"), tool.get("description"), _TEXT_INPUT)
    if tool.get("type") != "function":
        raise LogError(f"A tool has the type '{tool.get('type')}', and its schema is not in the log.")
    return function_tool(tool.get("name"), tool.get("description"), get_object(tool, "parameters"))
