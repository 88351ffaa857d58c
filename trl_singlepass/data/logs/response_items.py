"""
Items of OpenAI's Responses API as messages.

The API has an item for each part of a reply: its reasoning, its text, each of its calls. Chat templates read them as
one assistant message:

    reasoning, message, function_call, function_call, function_call_output, function_call_output
    → assistant (reasoning, content, two calls), tool, tool

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections.abc import Iterable

from ...rendering.conversation import Message
from .bad_lines import LogError
from .fields import get_objects, get_text, join_text, require
from .messages import assistant_message, tool_call, tool_message
from .requests import Json


_TEXT = ("input_text", "output_text", "text")
_PARTS = ("reasoning_content", "content", "tool_calls")  # in the order in which chat templates render them


def read_items(items: Iterable[Json]) -> list[Message]:
    """
    Return items of a request's input or of a response's output as messages.

    Reasoning that is there in encrypted form only leaves no trace in them. Raises [`LogError`] if an item is something
    else than a message, reasoning, or a call or result of a function.
    """
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
    """
    Return the output of a response as one message, and whether it has reasoning in encrypted form only.

    Raises [`LogError`] as [`read_items`] does, and if the items are not one message.
    """
    messages = read_items(items)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        kinds = ", ".join(map(get_kind, items)) or "none"
        raise LogError(
            f"The reply has items in the order {kinds}; chat templates render reasoning, then text, then tool calls."
        )
    hidden = "reasoning_content" not in messages[0] and any(item.get("type") == "reasoning" for item in items)
    return messages[0], hidden


def get_kind(item: Json) -> str:
    """Return the type of an item; messages may leave theirs out."""
    return str(item.get("type") or "message")


def is_reply_item(item: Json) -> bool:
    """Return whether the model wrote an item."""
    kind = get_kind(item)
    return kind in ("reasoning", "function_call", "custom_tool_call") or (
        kind == "message" and item.get("role") == "assistant"
    )


def _goes_on(last: Message, message: Message) -> bool:
    if last["role"] != "assistant":
        return False
    latest = max((_PARTS.index(key) for key in _PARTS if key in last), default=-1)
    first = min(_PARTS.index(key) for key in _PARTS if key in message)
    return first > latest or first == latest == _PARTS.index("tool_calls")


def _read_item(item: Json) -> Message | None:
    match get_kind(item):
        case "message":
            return _read_message(item)
        case "reasoning":
            text = join_text(get_objects(item, "content"), ("reasoning_text", "text"), "a reasoning item")
            return assistant_message(None, text) if text else None
        case "function_call":
            if item.get("namespace"):
                raise LogError(f"A call is in the namespace '{item['namespace']}', which no chat template renders.")
            arguments = get_text(item, "arguments")
            return assistant_message(None, None, [tool_call(item.get("name"), arguments, item.get("call_id"))])
        case "custom_tool_call":  # takes free text
            given = {"input": require(get_text(item, "input"), "input")}
            return assistant_message(None, None, [tool_call(item.get("name"), given, item.get("call_id"))])
        case "function_call_output" | "custom_tool_call_output":
            return tool_message(_read_output(item), item.get("call_id"))
        case kind:
            raise LogError(f"An item has the type '{kind}', which no chat template renders.")


def _read_message(item: Json) -> Message:
    role = require(get_text(item, "role"), "role")
    content = join_text(item.get("content"), _TEXT, f"a '{role}' message")
    if role == "assistant":
        return assistant_message(require(content, "content"))
    return {"role": role, "content": content}


def _read_output(item: Json) -> str:
    output = item.get("output")
    if isinstance(output, dict):  # of older versions of Codex
        output = output.get("content")
    return require(join_text(output, _TEXT, "the result of a tool"), "output")
