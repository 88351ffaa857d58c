"""The lines of log files, and the requests that are read from them: messages in one form, or tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...rendering.conversation import Message
from ...rendering.validation import RenderingError, check_messages, check_template_kwargs, check_tools, describe_type
from ..bad_rows import mask_details


Json = dict[str, Any]
Kind = TypeVar("Kind", dict[str, Any], list[Any], str)
Value = TypeVar("Value")
Logged = TypeVar("Logged")

_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "text"}
_REQUEST_KEYS = ("request", "request_body", "body")
_RESPONSE_KEYS = ("response", "response_body")
_CONVERSATION_KEYS = ("conversation_id", "session_id", "sessionId", "gen_ai.conversation.id", "session.id")
_SSE = ("data:", "event:", "id:", ":")
_DONE = "[DONE]"
_LINES_NAMED = 10


class LogError(ValueError):
    """Why a line of a log cannot be trained as it was sent."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a log."""

    path: str  # file, as the user named it
    line: int  # from 1; in a file that is one JSON value, the number of the element or the step in it

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a log."""

    place: Place
    entry: Json  # the JSON object on it

    def get_exchange(self, join_stream: Callable[[list[Json]], Json]) -> tuple[Json, Json]:
        """
        Return request and response, each under one of its keys (`request`, `body`, …) or on the line itself.

        Either may be wrapped once more, in `body`, and may be JSON text. A response may be a stream, as a list of
        events or as their text: `join_stream` puts its events together.
        """
        entry = self.entry
        request, response = _unwrap(entry, _REQUEST_KEYS), _find_stream(entry, join_stream)
        if response is None:
            response = _unwrap(entry, _RESPONSE_KEYS)
        request = {**(get(request, "model_parameters", dict) or {}), **request}  # of LiteLLM: tools, and the like
        # of OpenAI's Python client, which merges it into the request
        request = {**request, **(get(request, "extra_body", dict) or {})}
        error = response.get("error") or entry.get("error_str")  # of LiteLLM
        if response is entry and any(key in entry for key in _RESPONSE_KEYS) and not error:
            raise LogError("There is no response: the request failed or was not answered.")
        if error:
            message = get(error, "message", str) if isinstance(error, dict) else str(error)
            raise LogError(f"The response is an error: '{message}'.")
        if str(response.get("object", "")).endswith(".chunk"):
            raise LogError("The response is one part of a stream. Log all of its parts, on one line.")
        return request, response

    def get_conversation(self, request: Json) -> str | None:
        """Return the name of the conversation that a request belongs to, if the line or the request tells."""
        names = [parent[key] for parent in (self.entry, request) for key in _CONVERSATION_KEYS if parent.get(key)]
        return str(names[0]) if names else None


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """A request to a model and one reply to it: content is text, arguments of tool calls are JSON."""

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


# Bad lines -----------------------------------------------------------------------------------------------------------


class BadLines:
    """Lines that cannot be trained as they were sent, in the order in which they were found."""

    def __init__(self) -> None:
        self._reasons: dict[tuple[Place, str], None] = {}

    def __len__(self) -> int:
        return len({place for place, _ in self._reasons})

    def add(self, place: Place, reason: str) -> None:
        """Note why a line cannot be trained as it was sent."""
        self._reasons[place, reason] = None

    @contextmanager
    def at(self, place: Place) -> Iterator[None]:
        """Note the reason if a [`LogError`] ends what is done with a line."""
        try:
            yield
        except LogError as error:
            self.add(place, str(error))

    def group(self) -> list[str]:
        """Return a sentence for each reason with the lines that it holds for, the most frequent first."""
        groups: dict[str, list[tuple[Place, str]]] = {}
        for place, reason in self._reasons:
            groups.setdefault(mask_details(reason), []).append((place, reason))
        return [_describe(group) for group in sorted(groups.values(), key=len, reverse=True)]

    def error(self) -> LogError:
        """Return the error that names all bad lines."""
        count, they = ("1 line", "it was") if len(self) == 1 else (f"{len(self)} lines", "they were")
        reasons = "".join(f"\n- {reason}" for reason in self.group())
        return LogError(
            f"{count} of the log cannot be trained as {they} sent; --bad_lines drop leaves out such lines and counts "
            f"them:{reasons}"
        )


def _describe(group: list[tuple[Place, str]]) -> str:
    (first, reason), count = group[0], len(group)
    if count == 1:
        return f"{first}: {reason}"
    named: dict[str, list[int]] = {}
    for place, _ in group[:_LINES_NAMED]:
        named.setdefault(place.path, []).append(place.line)
    places = ", ".join(f"{path}:{', '.join(map(str, lines))}" for path, lines in named.items())
    more = f" and {count - _LINES_NAMED} more" if count > _LINES_NAMED else ""
    return f"{count} lines ({places}{more}), the first: {reason}"


def read_parts(
    lines: Iterable[LogLine],
    bad_lines: BadLines,
    read: Callable[[LogLine], Iterable[Logged]],
    find_parts: Callable[[Json], Sequence[Json]] = lambda entry: [entry],
) -> Iterator[Logged]:
    """Read lines, or parts of lines, that do not depend on each other: each is taken whole or not at all."""
    for line in lines:
        with bad_lines.at(line.place):
            parts = find_parts(line.entry)
            for number, entry in enumerate(parts, start=1):
                place = line.place if len(parts) == 1 else Place(f"{line.place}, part", number)
                with bad_lines.at(place):
                    yield from read(LogLine(place, entry))


# Fields --------------------------------------------------------------------------------------------------------------


def get(parent: Mapping[str, Any], key: str, kind: type[Kind]) -> Kind | None:
    """Return the object, list or text under a key, `None` if there is none; an object may be stored as JSON text."""
    value, expected = parent.get(key), _KINDS[kind]
    return _check(decode(value, key, expected) if expected == "an object" else value, key, kind)


def decode(value: Any, key: str, expected: str) -> Any:
    """Return the value of JSON text, and any other value as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (json.JSONDecodeError, RecursionError) as error:
        raise LogError(f"'{key}' is text that is not JSON, expected {expected}.") from error


def need(parent: Mapping[str, Any], key: str, kind: type[Kind]) -> Kind:
    """Return the object, list or text under a key."""
    return require(get(parent, key, kind), key)


def get_objects(parent: Mapping[str, Any], key: str) -> list[Json]:
    """Return the list of objects under a key; an empty list if there is none."""
    return [require(_check(item, key, dict), key) for item in get(parent, key, list) or []]


def require(value: Value | None, key: str) -> Value:
    """Return a value that must not be `None`."""
    if value is None:
        raise LogError(f"'{key}' is missing.")
    return value


def _check(value: object, key: str, kind: type[Kind]) -> Kind | None:
    if value is not None and not isinstance(value, kind):
        raise LogError(f"'{key}' has {describe_type(value)} where {_KINDS[kind]} is expected.")
    return value


# Request and response ------------------------------------------------------------------------------------------------


def _unwrap(entry: Json, keys: Sequence[str]) -> Json:
    for key in keys:
        if entry.get(key) is not None:
            found = get(entry, key, dict) or {}
            body = found.get("body")
            return (get(found, "body", dict) or {}) if isinstance(body, dict | str) else found
    return entry


def _find_stream(entry: Json, join_stream: Callable[[list[Json]], Json]) -> Json | None:
    for key in _RESPONSE_KEYS:
        value = entry.get(key)
        for found in (value, value.get("body") if isinstance(value, dict) else None):
            if isinstance(found, list) or (isinstance(found, str) and found.lstrip().startswith((*_SSE, "["))):
                events = read_events(found)
                failed = [event["error"] for event in events if event.get("error")]
                return {"error": failed[0]} if failed else join_stream(events)
    return None


# Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
def read_events(stream: str | Sequence[object]) -> list[Json]:
    """Return the events of a stream, at least one: objects or text, which is server-sent events or JSON."""
    events = (
        _read_text(stream) if isinstance(stream, str) else [event for item in stream for event in _read_item(item)]
    )
    if not events:
        raise LogError("The streamed response has no events.")
    return events


def unknown_stream(events: Sequence[Json]) -> LogError:
    """Return the error for a stream that is not that of the API."""
    kind = events[0].get("type") or events[0].get("object")
    return LogError(
        f"The streamed response has events of the type '{kind}' and no end: not those of a Chat Completions, "
        "Responses or Messages API."
    )


def decode_event(text: str) -> object:
    """Return the value of JSON text in a stream."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise LogError(f"The streamed response has an event that is not JSON: '{text[:40]}'.") from error


def _read_text(text: str) -> list[Json]:
    if text.strip() in ("", _DONE):
        return []
    if not text.lstrip().startswith(_SSE):
        items = decode_event(text)
        return [event for item in (items if isinstance(items, list) else [items]) for event in _read_item(item)]
    # An event's data may be on several lines; an empty line ends it.
    parts = text.replace("\r\n", "\n").replace("\r", "\n").split("\n\n")
    lines = [[line[5:].strip() for line in part.split("\n") if line.startswith("data:")] for part in parts]
    data = ["\n".join(part) for part in lines if part]
    return [_as_event(decode_event(item)) for item in data if item != _DONE]


def _read_item(item: object) -> list[Json]:
    return _read_text(item) if isinstance(item, str) else [_as_event(item)]


def _as_event(item: object) -> Json:
    if not isinstance(item, dict):
        raise LogError("The streamed response has an event that is no JSON object.")
    data = item.get("data")  # of clients that log the event's name beside it
    return data if isinstance(data, dict) else item


def get_index(part: Json, default: int) -> int:
    """Return the number of the choice, tool call or block that a part of a stream belongs to."""
    index = part.get("index")
    if not isinstance(index, int | None):
        raise LogError(f"The streamed response has the index '{index}', expected a number.")
    return default if index is None else index


def append_delta(whole: Json, more: Mapping[str, Any]) -> None:
    """Add to each text and list; what is neither, and reasons of the end, replace what was there."""
    for key, value in more.items():
        if value is None:
            continue
        before = whole.get(key)
        same = isinstance(value, str | list) and type(value) is type(before)
        whole[key] = before + value if same and not key.endswith("_reason") else value


# Messages ------------------------------------------------------------------------------------------------------------


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

    Parts with `text`, all of one of the `types`, are joined as chat templates print them; `where` names their owner.
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

    Contexts of a transcript share messages, which are checked once: `checked` are those of the request before by `id`;
    those of this one are returned.
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
