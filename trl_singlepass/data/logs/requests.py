"""What every format is read into: requests with their replies, as messages in one form or as tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...rendering.conversation import Message
from ...rendering.validation import RenderingError, check_messages, check_template_kwargs, check_tools, describe_type
from .lines import Json, LogError, Place


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
    conversation: str | None = None  # name of the conversation that it belongs to, where the log tells
    is_subagent: bool = False  # a subagent sent it
    follows_compaction: bool = False  # a summary stands in its context for what was said before
    # its system prompt and tools, if they are missing, are those that the user gives for the main conversation
    is_completed: bool = True
    # attachments were left out of the context, because the log does not hold how they were worded
    has_skipped_attachments: bool = False


@dataclass(frozen=True, slots=True)
class LoggedTokens:
    """A request and its reply as the tokens that an inference server read and wrote."""

    place: Place  # where the reply is in the log
    prompt_ids: list[int]
    completion_ids: list[int]
    conversation_id: str | None = None  # conversation that it belongs to, where the log tells


def given(**parts: Any) -> Json:
    """Return a message or a schema without the parts that are `None`."""
    return {key: value for key, value in parts.items() if value is not None}


def assistant_message(
    content: str | None, reasoning: str | None = None, tool_calls: Sequence[Json] | None = None
) -> Message:
    """Return an assistant message, with calls made by [`tool_call`]."""
    calls = list(tool_calls) if tool_calls else None
    return given(role="assistant", content=content, reasoning_content=reasoning, tool_calls=calls)


def tool_call(name: object, arguments: object, call_id: object = None) -> Json:
    """Return a call of a function, to which its result refers by `call_id`; arguments become JSON text."""
    if not isinstance(name, str) or not name:
        raise LogError("A tool call has no name.")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str | None):
        raise LogError(f"The arguments of a call of '{name}' are {describe_type(arguments)}, expected an object.")
    return given(id=call_id, type="function", function={"name": name, "arguments": arguments or "{}"})


def function_tool(name: object, description: object, parameters: object) -> Json:
    """Return a tool as chat templates read it."""
    return {"type": "function", "function": given(name=name, description=description, parameters=parameters)}


def join_text(content: object, where: str, types: Collection[str] = ("text",)) -> str | None:
    """
    Return the text of a message's content, `None` if there is no content.

    Parts of text are joined as chat templates print them, one after the other. Parts of `types` hold text under
    `text`; any other, such as an image, is a [`LogError`]. `where` names what the content belongs to.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise LogError(f"The content of {where} is {describe_type(content)}, expected text or a list of parts.")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else describe_type(part)
        if not isinstance(part, dict) or kind not in types or not isinstance(part.get("text"), str):
            raise LogError(f"The content of {where} has a part of type '{kind}': only text is trained.")
        texts.append(part["text"])
    return "".join(texts)


def check_request(request: LoggedRequest, checked: Mapping[int, Message]) -> dict[int, Message]:
    """
    Refuse a request that no chat template could render.

    Contexts of a transcript share their messages, and a message is checked once: `checked` holds those of the request
    before by `id`; those of this request are returned.
    """
    if not request.context:
        raise LogError("The request has no messages.")
    if "content" not in request.reply and "tool_calls" not in request.reply:
        raise LogError("The reply has neither text nor tool calls: the model stopped while it was reasoning.")
    messages = [*request.context, request.reply]
    try:
        if any(id(message) not in checked and not _is_right(message) for message in messages):
            check_messages(messages)  # names the message by its position
        check_tools(request.tools)
        check_template_kwargs(request.chat_template_kwargs)
    except RenderingError as error:
        raise LogError(str(error)) from error
    return {id(message): message for message in messages}


def _is_right(message: Message) -> bool:
    try:
        check_messages([message])
    except RenderingError:
        return False
    return True
