"""What a dataset example must hold to be a conversation: each fault named with message, key and way out."""

import json
from collections.abc import Collection, Mapping, Sequence
from types import UnionType
from typing import Any

from jinja2 import UndefinedError

from ..trees.errors import DataError


# Columns that hold a conversation together, in the order in which they are looked for.
MESSAGE_COLUMNS = (("messages",), ("prompt", "completion"), ("conversations",))
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
IMAGE_PARTS = ("image", "image_url", "input_image")
"""Types of content parts that are images."""
IMAGES_WAY_OUT = "Pass the processor (processing_class) if the model reads images; for a text model, remove them"
"""What to do where a tokenizer finds images."""
_OTHER_MEDIA = ("audio", "audio_url", "input_audio", "video", "video_url")
# Assistant messages in the formats of LLaMA-Factory and ms-swift. A chat template takes them as context: not trained.
_CALL_ROLES = ("function_call", "tool_call")
# Roles whose content is text; what a tool returns may be an object, which some templates print as JSON.
_TEXT_ROLES = ("system", "developer", "user", "assistant")
_OF_RENDERING = (
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize"),
)
_OF_TOOLS = ("name", "description", "parameters")


class RenderingError(DataError):
    """A conversation that the chat template cannot render without losing something that should be learned."""


def expected_columns(columns: Collection[str]) -> str:
    """Return the sentence that says which columns hold a conversation, and which there are."""
    return (
        "Expected a conversation in 'messages', in 'prompt' and 'completion', or in 'conversations', each a list of "
        f"messages; got the columns {sorted(columns)}. Rename the column that holds the messages to 'messages'."
    )


def is_image_part(part: object) -> bool:
    """Return whether a content part is an image."""
    return isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS


def check_example(
    groups: Sequence[Sequence[Any]], tools: object, kwargs: object, system: object, *, takes_images: bool
) -> None:
    """Refuse an example, given as the messages of each of its columns and what its other columns hold."""
    messages = [message for group in groups for message in group]
    check_messages(messages, takes_images=takes_images)
    if len(groups) == 2 and not groups[1]:
        raise RenderingError("'completion' is empty, so there is nothing to train. Add the answer, or leave it out.")
    check_tools(tools)
    check_template_kwargs({} if kwargs is None else kwargs)
    if not isinstance(system, str | None):
        raise RenderingError(
            f"'system' is {describe_type(system)}, expected the text of a system message. Rename the column if it "
            "holds something else."
        )
    first = messages[0] if messages and messages[0]["role"] in ("system", "developer") else None
    if first and system and system.strip() and system.strip() != get_text(first.get("content")).strip():
        raise RenderingError(
            f"There are two system prompts: the column 'system' and message 0 ('{first['role']}'). Keep one of them, "
            "or rename the column if it holds something else."
        )


def check_messages(messages: Sequence[Any], *, takes_images: bool = False) -> None:
    """Refuse messages that no chat template can render, or that would lose something in silence."""
    for index, message in enumerate(messages):
        _check_is_object(index, message)
        _check_role(index, message)
        _check_content(index, message, takes_images)
        for key in REASONING_KEYS if message["role"] == "assistant" else ():
            _expect(f"Message {index}", key, message.get(key), str | None, "text")
        _check_calls(index, message.get("tool_calls"))
        given = [key for key, value in message.items() if key not in ("role", "name") and value not in (None, [])]
        if message["role"] == "assistant" and not given:
            raise RenderingError(
                f"Message {index} says nothing: it has no content, reasoning or tool calls. Leave the row out, or "
                "give the message an empty text as its content if its answer is meant to be empty."
            )


def get_text(content: object) -> str:
    """Return the text of a message's content, which is a string or a list of blocks."""
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, Sequence) else []
    return "".join(block.get("text") or "" if isinstance(block, dict) else str(block) for block in blocks)


def check_tools(tools: object) -> None:
    """Refuse tools that are no list of JSON schemas or functions."""
    if tools is None:
        return
    if isinstance(tools, Mapping):
        raise RenderingError("'tools' is an object, expected a list of tools. Put the tool in a list.")
    if not isinstance(tools, list | tuple):
        raise RenderingError(
            f"'tools' is {describe_type(tools)}, expected a list of tools. Leave it empty without tools."
        )
    for index, tool in enumerate(tools):
        if callable(tool):
            continue
        if not isinstance(tool, Mapping):
            raise RenderingError(f"Tool {index} is {describe_type(tool)}, expected an object with its JSON schema.")
        _expect(f"Tool {index}", "function", tool.get("function"), Mapping | None, "an object")
        _expect(f"Tool {index}", "name", (tool.get("function") or tool).get("name"), str | None, "text")


def check_template_kwargs(kwargs: object) -> None:
    """Refuse arguments of the chat template that are no object, or that rendering sets itself."""
    if not isinstance(kwargs, Mapping):
        raise RenderingError(
            f"'chat_template_kwargs' is {describe_type(kwargs)}, expected an object such as "
            "{'enable_thinking': false}."
        )
    reserved = [name for name in _OF_RENDERING if kwargs.get(name) is not None]
    if reserved:
        raise RenderingError(
            f"'chat_template_kwargs' has '{reserved[0]}', which is set when turns are rendered. Remove it; tools have "
            "a column of their own."
        )


def missing_parts(error: Exception, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
    """Return, in parentheses, what a template missed if it raised an error about an undefined value."""
    if not isinstance(error, UndefinedError) and "Undefined" not in str(error):
        return ""
    found = [
        f"message {index} has no 'content'" for index, message in enumerate(messages) if message.get("content") is None
    ]
    for index, tool in enumerate(tools or []):
        schema = (tool.get("function") or tool) if isinstance(tool, Mapping) else dict.fromkeys(_OF_TOOLS, "")
        found += [f"tool {index} has no '{key}'" for key in _OF_TOOLS if schema.get(key) is None]
    return f" (missing: {'; '.join(found)})" if found else " (a tool or a message lacks a key that the template reads)"


def describe_type(value: object) -> str:
    """Return what a value is called in an error message."""
    names: dict[type, str] = {str: "text", bytes: "bytes", bool: "a boolean", int: "a number", float: "a number"}
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list) else names.get(type(value), f"a {type(value).__name__}")


def _check_is_object(index: int, message: object) -> None:
    if isinstance(message, list):
        raise RenderingError(
            f"Message {index} is a list, expected an object with 'role' and 'content'. Store each conversation in a "
            "row of its own."
        )
    if not isinstance(message, Mapping):
        raise RenderingError(
            f"Message {index} is {describe_type(message)}, expected an object with 'role' and 'content'. "
            "Repair it, or leave the row out."
        )


def _check_role(index: int, message: Mapping[str, Any]) -> None:
    role = message.get("role")
    if role is None and message.get("from") is not None:
        raise RenderingError(
            f"Message {index} has 'from' and 'value' in the place of 'role' and 'content'. Rename the column to "
            "'conversations', where this form is read."
        )
    if role is None or role == "":
        keys = [key for key, value in message.items() if value is not None]
        raise RenderingError(
            f"Message {index} has no 'role'; it has {keys or 'no keys'}. Give it one, such as 'user' or 'assistant'."
        )
    _expect(f"Message {index}", "role", role, str, "text such as 'user' or 'assistant'")
    if role in _CALL_ROLES:
        raise RenderingError(
            f"Message {index} has the role '{role}', which chat templates do not know. Make it an assistant message "
            "with 'tool_calls'; docs/migrating.md has a script."
        )


def _check_content(index: int, message: Mapping[str, Any], takes_images: bool) -> None:
    content, role = message.get("content"), message["role"]
    if content in (None, []) and role in _TEXT_ROLES and role != "assistant":
        raise RenderingError(f"Message {index} ('{role}') has no 'content'. Write it, or remove the message.")
    if isinstance(content, str | None) or (role not in _TEXT_ROLES and isinstance(content, Mapping)):
        return
    _expect(f"Message {index}", "content", content, list, "text or a list of text parts")
    for position, part in enumerate(content):
        _check_part(f"Part {position} of the content of message {index}", part, role, takes_images)


def _check_part(where: str, part: object, role: str, takes_images: bool) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _OTHER_MEDIA:
        raise RenderingError(
            f"{where} is of the type '{kind}': a single pass trains text and images. Leave the row out."
        )
    if kind in IMAGE_PARTS and not takes_images:
        raise RenderingError(
            f"{where} is of the type '{kind}', and a tokenizer cannot read images. {IMAGES_WAY_OUT}, or leave the row "
            "out."
        )
    if not isinstance(part, str | Mapping):
        raise RenderingError(f"{where} is {describe_type(part)}, expected an object with 'type' and 'text'.")
    if isinstance(part, str) or role not in _TEXT_ROLES:
        return
    text = part.get("text")
    if text is None and kind in ("text", None):
        raise RenderingError(f"{where} has no 'text'. Write it, or remove the part.")
    _expect(where, "text", text, str | None, "text")


def _check_calls(index: int, calls: object) -> None:
    if calls is None:
        return
    if not isinstance(calls, list):
        wrong = _wrong(f"Message {index}", "tool_calls", calls, "a list of calls")
        raise RenderingError(f"{wrong} {to_list(calls, 'Put the call in a list')}.")
    for position, call in enumerate(calls):
        where = f"Call {position} of message {index}"
        function = (call.get("function") or call) if isinstance(call, Mapping) else call
        if not isinstance(function, Mapping):
            raise RenderingError(
                f"{where} is {describe_type(function)}, expected an object with 'name' and 'arguments'."
            )
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not name:
            raise RenderingError(f"{where} has no 'name'. Write the name of the tool that it calls.")
        _expect(where, "arguments", arguments, Mapping | str | None, "an object, or JSON of one")


def _expect(where: str, key: str, value: object, kind: type | UnionType, expected: str) -> None:
    if not isinstance(value, kind):
        raise RenderingError(_wrong(where, key, value, expected))


def _wrong(where: str, key: str, value: object, expected: str) -> str:
    return f"{where} has '{key}' that is {describe_type(value)}, expected {expected}."


def to_list(value: object, otherwise: str = "Repair it, or leave the row out") -> str:
    """Return how to make a list of a value that should be one."""
    if isinstance(value, str) and isinstance(decode_json(value), list | dict):
        return "Decode the JSON with json.loads"
    return "Decode it" if isinstance(value, bytes) else otherwise


def decode_json(text: str) -> Any:
    """Return what a text says as JSON, `None` if it is none."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
