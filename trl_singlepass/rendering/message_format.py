"""Convert messages to the form that a chat template reads, without changing what they say."""

import json
from typing import Any, NamedTuple

from .conversation import Message, get_text
from .reasoning import (
    REASONING_KEYS,
    THINK,
    ParsedMessage,
    decode_arguments,
    with_reasoning_inline,
    with_reasoning_keys,
    with_reasoning_part,
)
from .template import ChatTemplate
from .template_behaviour import ShapeBehaviour, TemplateBehaviour, get_behaviour


class MessageForms(NamedTuple):
    """A message as the template reads it in a prompt, and as it reads it to write the message's own completion."""

    context: Message
    trained: Message


def parse(message: Message, template: ChatTemplate) -> ParsedMessage:
    """Return what an assistant message says, given the tags that a template knows."""
    return ParsedMessage.from_message(message, template.tags)


def as_read(message: Message, template: ChatTemplate) -> MessageForms:
    """
    Return a message in the forms that a template reads, however its author spelt it.

    A completion is the same for every spelling. In a prompt, reasoning may move to the key that the template reads,
    but never into the content: one that reads no key shows none of earlier turns.
    """
    behaviour = get_behaviour(template)
    # As servers do, an empty list of calls is read as none: a template may look for the key alone.
    message = {k: value for k, value in message.items() if value is not None and (k, value) != ("tool_calls", [])}
    if message.get("role") != "assistant":
        read = with_content_as_read(message, behaviour)
        return MessageForms(read, read)
    parsed = parse(message, template)
    if message.get("tool_calls"):
        message = {**message, "tool_calls": [_call_as_read(call, behaviour) for call in message["tool_calls"]]}
    if not parsed.reasoning or parsed.given_twice:
        read = with_content_as_read(message, behaviour)
        return MessageForms(read, read)
    shape = behaviour.calls if parsed.calls else behaviour.answers
    in_key = with_reasoning_keys(message, parsed, behaviour.reasoning_keys or REASONING_KEYS[:2])
    in_part, as_given = with_reasoning_part(message, parsed), _as_given(message, parsed, behaviour, shape, template)
    if shape.reasoning_keys:
        trained = in_key
    elif shape.reads_parts:
        trained = in_part
    elif as_given and (shape.keeps_inline or template.tags is None):
        trained = as_given  # history keeps this spelling
    elif shape.reads_inline and template.tags is not None:
        trained = with_reasoning_inline(message, parsed, template.tags)
    else:  # hidden alike in every spelling, and written by the package
        trained = in_key
    context = as_given or in_key
    return MessageForms(with_content_as_read(context, behaviour), with_content_as_read(trained, behaviour))


def _as_given(
    message: Message,
    parsed: ParsedMessage,
    behaviour: TemplateBehaviour,
    shape: ShapeBehaviour,
    template: ChatTemplate,
) -> Message | None:
    """Return a message whose content holds its reasoning, `None` if the template does not read it there."""
    if any(isinstance(message.get(key), str) and message[key].strip() for key in REASONING_KEYS):
        return None
    if not parsed.is_inline:
        return message if shape.reads_parts else None
    is_hidden = not behaviour.reasoning_keys and (shape.strips_inline or template.tags is None)
    is_read = parsed.inline == (template.tags or THINK) and (shape.reads_inline or is_hidden)
    return {**message, "content": get_text(message["content"])} if is_read else None


def with_content_as_read(message: Message, behaviour: TemplateBehaviour) -> Message:
    """Return a message whose content has the form that the template takes: a string, a list of parts, or none."""
    role, content = message.get("role"), message.get("content")
    is_text = isinstance(content, str) or (isinstance(content, list) and all(map(_is_text, content)))
    if role == "assistant" and (content is None or (is_text and not get_text(content))):
        if message.get("tool_calls") and not behaviour.needs_content:
            return {key: value for key, value in message.items() if key != "content"}
        content = ""
    if isinstance(content, str) and role in behaviour.parts_roles:
        content = [{"type": "text", "text": content}]
    elif isinstance(content, list) and role in behaviour.string_roles and is_text:
        content = get_text(content)
    elif isinstance(content, list) and role not in behaviour.kept_lists:
        content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return message if content is message.get("content") else {**message, "content": content}


def _is_text(part: object) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str))


def _call_as_read(call: dict[str, Any], behaviour: TemplateBehaviour) -> dict[str, Any]:
    """Return a call with its function under a key of its own, and the arguments as the template takes them."""
    function = dict(call.get("function") or {key: value for key, value in call.items() if key not in _OF_CALLS})
    outside = {key: value for key, value in call.items() if call.get("function") or key in _OF_CALLS}
    arguments = decode_arguments(function.get("arguments") or {})
    if arguments is not None:
        as_json = behaviour.arguments_as_json
        function["arguments"] = json.dumps(arguments, ensure_ascii=False) if as_json else arguments
    return {"type": "function", **outside, "function": function}


_OF_CALLS = ("id", "type", "index")
