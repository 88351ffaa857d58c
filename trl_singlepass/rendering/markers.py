"""Replace the words of messages with markers, which show where a template puts each part of a message."""

from dataclasses import dataclass
from typing import Any

from .conversation import Message
from .reasoning import REASONING_KEYS, ParsedMessage


# Words that no template and no conversation contains.
CONTEXT_MARKER, _REASONING, _ANSWER, _NAME = "Xqcontextqx", "Xqreasoningqx", "Xqanswer{}qx", "Xqname{}qx"


@dataclass(frozen=True, slots=True)
class MarkedMessage:
    """
    An assistant message of the same shape, in which each part is one marker.

    Args:
        message (`dict`):
            The message.
        reasoning (`str`):
            Marker of its reasoning.
        answers (`list[str]`):
            Markers of its content: one, or one for each text part.
        names (`list[str]`):
            Markers of the names of the functions that it calls.
    """

    message: Message
    reasoning: str
    answers: list[str]
    names: list[str]

    def find_first(self, text: str) -> int:
        """Return the position of the first marker in a text, -1 if it holds none."""
        found = [text.find(marker) for marker in (self.reasoning, *self.answers, *self.names)]
        return min((position for position in found if position >= 0), default=-1)


def mark_message(message: Message, parsed: ParsedMessage) -> MarkedMessage:
    """Return an assistant message, in the form that its template reads, with markers in place of its words."""
    marked = {
        key: _REASONING if key in REASONING_KEYS and _has_text(value) else value for key, value in message.items()
    }
    content, answers = message.get("content"), [_ANSWER.format(0)]
    if isinstance(content, list):
        answers = [_ANSWER.format(i) for i in range(len(content))]
        marked["content"] = [_mark_part(part, answer) for part, answer in zip(content, answers, strict=True)]
    elif parsed.inline:
        marked["content"] = _mark_inline(str(content), parsed)
    elif _has_text(content) or not parsed.calls:
        marked["content"] = answers[0]
    names = [_NAME.format(i) for i in range(len(parsed.calls))]
    if names:
        marked["tool_calls"] = [
            _with_name(call, name) for call, name in zip(message["tool_calls"], names, strict=True)
        ]
    return MarkedMessage(marked, _REASONING, answers, names)


def mark_context(message: Message) -> Message:
    """Return a message with one marker in place of its content and of its reasoning."""
    marked = {
        key: CONTEXT_MARKER if key in ("content", *REASONING_KEYS) and _has_text(value) else value
        for key, value in message.items()
    }
    if isinstance(message.get("content"), list):
        marked["content"] = [_mark_part(part, CONTEXT_MARKER) for part in message["content"]]
    return marked


def own_strings(message: Message) -> list[str]:
    """Return every string in a message: content, reasoning, names and arguments of calls, at any depth."""
    return [text for value in message.values() for text in _strings(value)]


def _strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (str(key), *_strings(item))]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _strings(item)]
    return [] if value is None else [str(value)]


def _has_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _mark_part(part: Any, marker: str) -> Any:
    if isinstance(part, str):
        return marker if part.strip() else part
    marked = dict(part)
    for key in ("text", *REASONING_KEYS):
        if _has_text(marked.get(key)):
            marked[key] = marker if key == "text" or marker == CONTEXT_MARKER else _REASONING
        elif isinstance(marked.get(key), list):
            marked[key] = [
                _mark_part(item, marker if marker == CONTEXT_MARKER else _REASONING) for item in marked[key]
            ]
    return marked


def _mark_inline(content: str, parsed: ParsedMessage) -> str:
    """Mark reasoning and answer where they stand, so that the tags between them stay as they are."""
    start = content.index(parsed.reasoning, content.index(">") + 1 if ">" in content else 0)
    end = start + len(parsed.reasoning)
    answer = parsed.answer.strip()
    rest = content[end:]
    at = len(rest) - len(parsed.answer)
    return (
        content[:start] + _REASONING + rest[:at] + parsed.answer.replace(answer, _ANSWER.format(0), 1) * bool(answer)
    )


def _with_name(call: dict[str, Any], marker: str) -> dict[str, Any]:
    """Mark the name of a called function, in the call's id as well: Kimi K2 prints `functions.get_weather:0` alone."""
    function = call.get("function") or call
    marked = {**call, "function": {**function, "name": marker}} if call.get("function") else {**call, "name": marker}
    if isinstance(call.get("id"), str) and function.get("name"):
        marked["id"] = call["id"].replace(str(function["name"]), marker)
    return marked
