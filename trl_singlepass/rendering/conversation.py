"""A dataset example as a conversation: messages, tools and template arguments, without the keys that Arrow adds."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..images.conversation_images import ConversationImages
from .validation import MESSAGE_COLUMNS, check_example, describe_type, expected_columns, to_list
from .validation import RenderingError as RenderingError
from .validation import get_text as get_text


Message = dict[str, Any]
# JSON schemas, or Python functions that transformers turns into schemas.
Tools = list[dict[str, Any] | Callable[..., Any]]

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """
    What one dataset example says, in the form that `apply_chat_template` takes.

    `template_kwargs` are further arguments of the chat template, such as `enable_thinking`. Messages before
    `first_trained` are context only. Each of the `images` stands in the messages as a part `{"type": "image"}`.
    """

    messages: list[Message]
    tools: Tools | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    first_trained: int = 0
    images: ConversationImages | None = None

    @property
    def turns(self) -> list[int]:
        """Positions of the assistant messages that may be trained."""
        roles = [message.get("role") for message in self.messages]
        return [k for k in range(self.first_trained, len(roles)) if roles[k] == "assistant"]

    @classmethod
    def from_example(cls, example: dict[str, Any], images: ConversationImages | None = None) -> "Conversation":
        """
        Read a dataset example, or refuse it.

        It has `messages`, or `prompt` and `completion`, or ShareGPT's `conversations`; optionally `tools` and
        `chat_template_kwargs`, each as an object or as a JSON string, and the text of a system message in `system`. In
        dicts that went through Arrow, keys whose value is `None` are dropped: Arrow gives every struct the keys of all
        of them. A null argument of a tool call is kept where the tool's schema requires the argument, or where the
        arguments are a JSON string.
        """
        columns = _message_columns(example)
        groups = [_chatml(example[name]) if name == "conversations" else example[name] for name in columns]
        tools, kwargs = _decoded_tools(example.get("tools")), _decoded(example, "chat_template_kwargs")
        check_example(groups, tools, kwargs, example.get("system"), takes_images=images is not None)
        # From a JSON string: no Arrow, no added keys.
        tools = (_without_added_keys(tools) if isinstance(example.get("tools"), list) else tools) or None
        required = _required_arguments(tools)
        messages = [message for group in groups for message in _read_messages(group, required)]
        system = _system_message(example.get("system"), messages)
        return cls(
            messages=[*system, *messages],
            tools=tools,
            template_kwargs={key: value for key, value in (kwargs or {}).items() if value is not None},
            first_trained=len(system) + len(groups[0]) if len(groups) == 2 else 0,
            images=images,
        )


def get_function_calls(message: Message) -> list[dict[str, Any]]:
    """Return the functions that a message calls, each a dict with `name` and `arguments`."""
    calls = message.get("tool_calls") or []
    return [call.get("function") or call for call in calls]


def _message_columns(example: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns that hold the conversation of an example: one of `MESSAGE_COLUMNS`, or it is refused."""
    for columns in MESSAGE_COLUMNS:
        if all(isinstance(example.get(name), list) for name in columns):
            return columns
    given = [columns for columns in MESSAGE_COLUMNS if set(columns) <= set(example)]
    filled = [columns for columns in given if any(example[name] is not None for name in columns)]
    for columns in (filled or given)[:1]:
        name = next(name for name in columns if not isinstance(example[name], list))
        raise RenderingError(
            f"'{name}' is {describe_type(example[name])}, expected a list of messages. {to_list(example[name])}."
        )
    raise RenderingError(expected_columns(example))


def _chatml(conversations: list[Any]) -> list[Any]:
    from trl import maybe_convert_to_chatml  # here, because it imports torch

    if not all(isinstance(message, dict) for message in conversations):
        return conversations
    # It renames the keys in place, so it works on copies.
    messages = maybe_convert_to_chatml({"conversations": [dict(message) for message in conversations]})["messages"]
    roles = [message.get("role") for message in messages]
    roles = [SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role for role in roles]
    return [{**message, "role": role} for message, role in zip(messages, roles, strict=True)]


def _system_message(text: str | None, messages: list[Message]) -> list[Message]:
    """Return the system message that a column of its own holds, unless the conversation begins with it."""
    given = messages[0]["role"] in ("system", "developer") if messages else False
    return [{"role": "system", "content": text}] if text and text.strip() and not given else []


def _decoded(example: dict[str, Any], column: str) -> Any:
    value = example.get(column)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (json.JSONDecodeError, RecursionError) as error:
        raise RenderingError(
            f"Expected JSON in the column '{column}', got {value[:60]!r} ({error}). Store it with json.dumps."
        ) from error


def _decoded_tools(value: object) -> Any:
    if isinstance(value, list):
        return [_decoded({"tools": tool}, "tools") for tool in value]
    return _decoded({"tools": value}, "tools")


def _read_messages(messages: list[Message], required: dict[Any, set[str]]) -> list[Message]:
    """Drop what Arrow added, the arguments of other tools' calls among it."""
    if not _share_keys(messages):
        return messages
    messages = _without_added_keys(messages, untouched="arguments")
    calls = [call for message in messages for call in get_function_calls(message)]
    siblings = _without_added_keys([call.get("arguments") for call in calls])
    arguments = iter(
        _in_order(call["arguments"], cleaned, required.get(call.get("name"), set()))
        if isinstance(cleaned, dict)
        else cleaned
        for call, cleaned in zip(calls, siblings, strict=True)
    )
    return [
        {**message, "tool_calls": [_with_arguments(call, next(arguments)) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _in_order(arguments: dict[str, Any], cleaned: dict[str, Any], needed: set[str]) -> dict[str, Any]:
    """Arguments in their order, with the nulls that the schema of the tool cannot do without."""
    return {key: cleaned.get(key) for key in arguments if key in cleaned or key in needed}


def _with_arguments(call: dict[str, Any], arguments: Any) -> dict[str, Any]:
    function = call.get("function")
    if function:
        return {**call, "function": {**function, "arguments": arguments} if "arguments" in function else function}
    return {**call, "arguments": arguments} if "arguments" in call else call


def _required_arguments(tools: Tools | None) -> dict[Any, set[str]]:
    functions = [tool.get("function") or tool for tool in tools or [] if isinstance(tool, dict)]
    parameters = {function.get("name"): function.get("parameters") for function in functions}
    required = {name: schema.get("required") for name, schema in parameters.items() if isinstance(schema, dict)}
    return {
        name: {argument for argument in names if isinstance(argument, str)}
        for name, names in required.items()
        if isinstance(names, list)
    }


def _share_keys(dicts: list[dict[str, Any]]) -> bool:
    return len({tuple(item) for item in dicts}) == 1


def _without_added_keys(siblings: list[Any], untouched: str = "") -> list[Any]:
    """
    Drop the keys that Arrow added to values found in the same place of an example, but not in those of `untouched`.

    Arrow gives all structs of a column the same keys and fills the absent ones with `None`. So dicts that differ in
    their keys did not come through Arrow, and are returned as they are.
    """
    dicts = [item for item in siblings if isinstance(item, dict)]
    if dicts and _share_keys(dicts):
        columns = {key: _clean_column(key, dicts, untouched) for key in dicts[0]}
        cleaned = iter(
            [{key: columns[key][i] for key in item if item[key] is not None} for i, item in enumerate(dicts)]
        )
        return [next(cleaned) if isinstance(item, dict) else item for item in siblings]
    if not dicts and any(isinstance(item, list) for item in siblings):
        lists = [item if isinstance(item, list) else [] for item in siblings]
        elements = iter(_without_added_keys([element for item in lists for element in item], untouched))
        return [[next(elements) for _ in item] if isinstance(item, list) else item for item in siblings]
    return siblings


def _clean_column(key: str, dicts: list[dict[str, Any]], untouched: str) -> list[Any]:
    values = [item[key] for item in dicts]
    return values if key == untouched else _without_added_keys(values, untouched)
