"""
Logs of OpenAI's Chat Completions API, as proxies and OpenAI-compatible servers write them.

Source: https://platform.openai.com/docs/api-reference/chat and, for `chat_template_kwargs`, `reasoning_effort`,
`reasoning` and `stop_reason`, vLLM's and SGLang's OpenAI-compatible servers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ...rendering.conversation import Message
from ...rendering.validation import REASONING_KEYS
from .bad_lines import BadLines, LogError
from .exchange import get_exchange
from .fields import get_object, get_objects, get_text, join_text, require
from .messages import assistant_message, tool_call, tool_message
from .requests import Json, LoggedRequest, LogLine, parse_each_line


_ENDED = ("stop", "tool_calls")
# What would change the prompt in a way that a dataset cannot say.
_UNTRAINABLE = ("functions", "documents", "chat_template", "continue_final_message")


def parse(lines: Iterable[LogLine], bad_lines: BadLines) -> Iterator[LoggedRequest]:
    """Yield each choice of each response with the messages that were sent."""
    return parse_each_line(lines, bad_lines, _parse_line)


def _parse_line(line: LogLine) -> list[LoggedRequest]:
    request, response = get_exchange(line)
    untrainable = [key for key in _UNTRAINABLE if request.get(key)]
    if untrainable:
        raise LogError(f"The request has '{untrainable[0]}', which changes the prompt in a way that no dataset holds.")
    require(request.get("messages"), "messages")
    context = [read_message(message) for message in get_objects(request, "messages")]
    tools = get_objects(request, "tools") or None
    kwargs = _get_template_kwargs(request)
    requests = []
    for choice in get_choices(response):
        check_ended(choice)
        message = require(get_object(choice, "message"), "message")
        reply = read_message({**message, "role": "assistant"})
        hidden = "reasoning_content" not in reply and _has_encrypted_reasoning(message)
        requests.append(LoggedRequest(line.place, context, reply, tools, kwargs, hidden))
    return requests


def get_choices(response: Json) -> list[Json]:
    """Return the choices of a response, at least one."""
    choices = get_objects(response, "choices")
    if not choices:
        raise LogError("The response has no choices.")
    return choices


def check_ended(choice: Json) -> None:
    """Refuse a reply that did not end by itself: it would be trained as if the model had meant to stop there."""
    reason, stop = choice.get("finish_reason"), choice.get("stop_reason")
    if reason not in _ENDED:
        raise LogError(f"The reply did not end: its finish_reason is '{reason}', expected 'stop' or 'tool_calls'.")
    if isinstance(stop, str):
        raise LogError(f"The reply was cut at the stop string '{stop}'.")


def read_message(message: Json) -> Message:
    """
    Return a message of the Chat Completions API in the form of [`LoggedRequest`].

    Keys that chat templates do not read (`annotations`, `provider_specific_fields`, …) are left out. Raises
    [`LogError`] if it holds something else than text, reasoning and calls of functions.
    """
    role = require(get_text(message, "role"), "role")
    if role == "assistant":
        return _read_assistant(message)
    content = join_text(message.get("content"), ("text",), f"a '{role}' message")
    if role == "tool":
        return tool_message(content or "", message.get("tool_call_id"), message.get("name"))
    if role == "function":
        raise LogError("A message has the role 'function', which has been replaced by 'tool'.")
    name = {} if message.get("name") is None else {"name": message["name"]}
    return {"role": role, **name, "content": content}


def _read_assistant(message: Json) -> Message:
    lost = [key for key in ("refusal", "audio", "function_call") if message.get(key)]
    if lost:
        raise LogError(f"An assistant message has '{lost[0]}', which no chat template renders.")
    content = join_text(message.get("content"), ("text",), "an assistant message")
    given = (get_text(message, key) for key in REASONING_KEYS)
    reasoning = next((text for text in given if text is not None), None)
    calls = [_read_call(call) for call in get_objects(message, "tool_calls")]
    return assistant_message(content, reasoning, calls)


def _read_call(call: Json) -> Json:
    function = get_object(call, "function")
    if function is None:
        raise LogError(f"A tool call has the type '{call.get('type')}', expected 'function'.")
    return tool_call(function.get("name"), function.get("arguments"), call.get("id"))


def _get_template_kwargs(request: Json) -> dict[str, Any]:
    kwargs = dict(get_object(request, "chat_template_kwargs") or {})
    if request.get("reasoning_effort") is not None:  # servers hand it to the template
        kwargs.setdefault("reasoning_effort", request["reasoning_effort"])
    return kwargs


def _has_encrypted_reasoning(message: Json) -> bool:
    return any(detail.get("type") == "reasoning.encrypted" for detail in get_objects(message, "reasoning_details"))
