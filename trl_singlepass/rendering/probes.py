"""Small conversations that show how a chat template treats messages, each in the form that the template takes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .conversation import Message, RenderingError
from .template import ChatTemplate


# Words that no template contains.
USER, ANSWER, REASONING, VALUE, TEXT = "Juniper", "Aspen", "Rowan", "Maple", "Willow"
_PARAMETERS = {"type": "object", "properties": {"elm": {"type": "string", "description": "Elm"}}, "required": ["elm"]}
TOOL = {"type": "function", "function": {"name": "oak", "description": "Oak", "parameters": _PARAMETERS}}
_ROLES = ("user", "assistant", "tool", "system")


@dataclass(frozen=True)
class Probe:
    """Renders small conversations with a chat template, each once."""

    template: ChatTemplate
    known: dict[str, str] = field(default_factory=dict)

    def render(self, *messages: Message, add_generation_prompt: bool = False) -> str:
        """Return a rendering, or an empty string if the template refuses the messages."""
        key = repr((messages, add_generation_prompt))
        if key not in self.known:
            try:
                self.known[key] = self.template.render(list(messages), add_generation_prompt)
            except RenderingError:
                self.known[key] = ""
        return self.known[key]

    @cached_property
    def user(self) -> Message:
        """A message of the user."""
        return {"role": "user", "content": self._content("user", USER)}

    @cached_property
    def tool_result(self) -> Message:
        """The result of the tool call."""
        return {**_TOOL, "content": self._content("tool", "Linden")}

    def answer(self, content: str = ANSWER, **fields: Any) -> Message:
        """Return an answer with further fields, such as its reasoning."""
        return {"role": "assistant", "content": self._content("assistant", content), **fields}

    def tool_call(self, **fields: Any) -> Message:
        """Return a message that calls a tool, with further fields."""
        return {**_tool_call(*self.call_form), **fields}

    def _content(self, role: str, text: str) -> str | list[dict[str, str]]:
        return text if self.takes[role][0] or not self.takes[role][1] else [part("text", text)]

    @cached_property
    def takes(self) -> dict[str, tuple[bool, bool]]:
        """For each role, whether the template prints content as text that is a string, and that is a list of parts."""
        return {role: (self._prints(role, TEXT), self._prints(role, [part("text", TEXT)])) for role in _ROLES}

    def keeps_lists(self, role: str) -> bool:
        """Whether a list that holds strings must stay as it is: printed as JSON, or refused where parts are taken."""
        string, parts = self.takes[role]
        return not string and (not parts or not any(self._renderings(role, [TEXT])))

    def _prints(self, role: str, content: object) -> bool:
        call = _tool_call(*self.call_form)
        beside_calls = [self.render(user, {**call, "content": content}) for user in _USERS if role == "assistant"]
        is_shown = any(TEXT in text and not prints_object(text, TEXT) for text in self._renderings(role, content))
        return is_shown and not any(prints_object(text, TEXT) for text in beside_calls)

    def _renderings(self, role: str, content: object) -> list[str]:
        message = {**(_TOOL if role == "tool" else {"role": role}), "content": content}
        call = _tool_call(*self.call_form)
        around: dict[str, list[tuple[Message, ...]]] = {
            "user": [(message,)],
            "system": [(message, user) for user in _USERS],
            "assistant": [(user, message) for user in _USERS],
            "tool": [(user, call, message) for user in _USERS],
        }
        return [self.render(*messages) for messages in around[role]]

    @cached_property
    def call_form(self) -> tuple[bool, bool]:
        """Whether arguments must be JSON strings, and whether a message that only calls tools must have a content."""
        # Empty content first: some templates take a message without any only if it is the last one.
        forms = [(as_json, with_content) for as_json in (False, True) for with_content in (True, False)]
        last = {form: [self.render(user, _tool_call(*form)) for user in _USERS] for form in forms}
        later = {
            form: [
                self.render(user, _tool_call(*form), {**_TOOL, "content": result}, {"role": "user", **user})
                for user in _USERS
                for result in ("Linden", [part("text", "Linden")])
            ]
            for form in forms
        }
        for renderings in ({form: last[form] for form in forms if any(later[form])}, last):
            for form, texts in renderings.items():
                # A dict printed by Python, or a string encoded as JSON once more, is no form that a model learned.
                shown = [text for text in texts if VALUE in text]
                if any(f"{{'elm': '{VALUE}'}}" not in text and f'\\"{VALUE}' not in text for text in shown):
                    return form
        return False, not any(last[False, False])


_TOOL: Message = {"role": "tool", "name": "oak", "tool_call_id": "call00000"}


def part(kind: str, text: str) -> dict[str, str]:
    """Return a content part."""
    return {"type": kind, kind: text}


_USERS: tuple[Message, Message] = (
    {"role": "user", "content": USER},
    {"role": "user", "content": [part("text", USER)]},
)


def _tool_call(as_json: bool, with_content: bool) -> Message:
    arguments = {"elm": VALUE}
    function = {"name": "oak", "arguments": json.dumps(arguments) if as_json else arguments}
    message: Message = {
        "role": "assistant",
        "tool_calls": [{"id": "call00000", "type": "function", "function": function}],
    }
    return {**message, "content": ""} if with_content else message


def prints_object(text: str, word: str) -> bool:
    """Whether a text shows a word as the value of an object, as Python or JSON writes it."""
    return re.search(rf"""['"]\w+\\*['"]: ?\\*['"]{word}""", text) is not None
