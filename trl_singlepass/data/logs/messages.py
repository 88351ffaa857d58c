"""The messages that every format is turned into: content as text, reasoning under one key, arguments as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...rendering.conversation import Message
from ...rendering.validation import RenderingError, check_messages, check_template_kwargs, check_tools, describe_type
from .bad_lines import LogError
from .requests import Json, LoggedRequest


def assistant_message(
    content: str | None, reasoning: str | None = None, tool_calls: Sequence[Json] | None = None
) -> Message:
    """Return an assistant message, with calls made by [`tool_call`], without the keys that have no value."""
    message: Message = {"role": "assistant"}
    if content is not None:
        message["content"] = content
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if tool_calls:
        message["tool_calls"] = list(tool_calls)
    return message


def tool_call(name: object, arguments: object, call_id: object = None) -> Json:
    """
    Return a call of a function, with its arguments as JSON; text is kept as it is. The result refers to `call_id`.

    Raises [`LogError`] if there is no name, or the arguments are given and neither text nor an object.
    """
    if not isinstance(name, str) or not name:
        raise LogError("A tool call has no name.")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str | None):
        raise LogError(f"The arguments of a call of '{name}' are {describe_type(arguments)}, expected an object.")
    call: Json = {} if call_id is None else {"id": call_id}
    return {**call, "type": "function", "function": {"name": name, "arguments": arguments or "{}"}}


def tool_message(content: str, call_id: object = None, name: object = None) -> Message:
    """Return the message with the result of a tool call."""
    message: Message = {"role": "tool", "content": content}
    given = {"tool_call_id": call_id, "name": name}
    return {**message, **{key: value for key, value in given.items() if value is not None}}


def function_tool(name: object, description: object, parameters: object) -> Json:
    """Return a tool as chat templates read it; a description or parameters that are `None` are left out."""
    given: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": {key: value for key, value in given.items() if value is not None}}


def check_request(request: LoggedRequest, checked: dict[int, Message]) -> None:
    """
    Refuse a request that no chat template could render.

    Contexts of a transcript share their messages, and a message is checked once: `checked` holds, by `id`, those that
    have been, and those of this request are added.

    Raises [`LogError`] if the context is empty, or a message, a tool or a template argument is of a wrong form.
    """
    if not request.context:
        raise LogError("The request has no messages.")
    if "content" not in request.reply and "tool_calls" not in request.reply:
        raise LogError("The reply has neither text nor tool calls: the model stopped while it was reasoning.")
    messages = [*request.context, request.reply]
    try:
        if any(id(message) not in checked and not _is_right(message) for message in messages):
            check_messages(messages)  # names the message by its position
        checked.update((id(message), message) for message in messages)
        check_tools(request.tools)
        check_template_kwargs(request.chat_template_kwargs)
    except RenderingError as error:
        raise LogError(str(error)) from error


def _is_right(message: Message) -> bool:
    try:
        check_messages([message])
    except RenderingError:
        return False
    return True
