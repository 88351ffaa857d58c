"""Convert messages to the form that a chat template reads, without changing what they say."""

import json
from typing import Any

from .conversation import Message, get_text
from .reasoning import (
    REASONING_KEYS,
    THINK,
    ParsedMessage,
    with_reasoning_inline,
    with_reasoning_key,
)
from .template import ChatTemplate
from .traits import Traits, get_traits


def parse(message: Message, template: ChatTemplate) -> ParsedMessage:
    """Return what an assistant message says, given the tags that a template knows."""
    return ParsedMessage.from_message(message, template.tags)


def as_context(message: Message, template: ChatTemplate) -> Message:
    """
    Return a message as the template reads it in a prompt.

    Reasoning moves to the key that the template reads, but never into the content: what a prompt shows of earlier
    reasoning is the template's decision, and one that reads no key shows none.
    """
    traits = get_traits(template)
    message = {key: value for key, value in message.items() if value is not None}
    if message.get("role") != "assistant":
        return _with_content_as_read(message, traits)
    parsed = parse(message, template)
    if parsed.reasoning and not _is_read_as_given(message, parsed, template):
        # Where no key is read, transformers' choice of keys: some templates read them beside tool calls only.
        message = with_reasoning_key(message, parsed, traits.reasoning_keys or REASONING_KEYS[:2])
    if message.get("tool_calls"):
        message = {**message, "tool_calls": [_with_arguments_as_read(call, traits) for call in message["tool_calls"]]}
    if not message.get("tool_calls") or traits.needs_content:
        message = {"content": "", **message}
    return _with_content_as_read(message, traits)


def as_trained(message: Message, template: ChatTemplate) -> Message:
    """Return an assistant message as the template reads it to write its completion, reasoning included."""
    message, traits, tags = as_context(message, template), get_traits(template), template.tags
    parsed = parse(message, template)
    if not parsed.reasoning or parsed.inline or traits.reasoning_keys or not traits.reads_inline or tags is None:
        return message
    if _is_read_as_given(message, parsed, template):
        return message
    return with_reasoning_inline(message, parsed, tags)


def _is_read_as_given(message: Message, parsed: ParsedMessage, template: ChatTemplate) -> bool:
    traits = get_traits(template)
    if parsed.inline:
        takes_inline = traits.reads_inline or (traits.strips_inline and not traits.reasoning_keys)
        return takes_inline and template.tags in (None, THINK)
    in_parts = not any(isinstance(message.get(key), str) and message[key].strip() for key in REASONING_KEYS)
    return in_parts and traits.reads_parts


def _with_content_as_read(message: Message, traits: Traits) -> Message:
    role, content = message.get("role"), message.get("content")
    if isinstance(content, str) and role in traits.parts_roles:
        return {**message, "content": [{"type": "text", "text": content}]}
    if isinstance(content, list) and role in traits.string_roles and all(map(_is_text, content)):
        return {**message, "content": get_text(content)}
    return message


def _is_text(part: object) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str))


def _with_arguments_as_read(call: dict[str, Any], traits: Traits) -> dict[str, Any]:
    function = dict(call.get("function") or call)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and not traits.arguments_as_json:
        decoded = _decode_object(arguments)
        function["arguments"] = arguments if decoded is None else decoded
    elif isinstance(arguments, dict) and traits.arguments_as_json:
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": function} if call.get("function") else function


def _decode_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None  # models sometimes write calls that are not valid JSON; the template may still print them
    return value if isinstance(value, dict) else None
