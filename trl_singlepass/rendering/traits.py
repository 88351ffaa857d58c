"""How a chat template treats messages, found by rendering small conversations with it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from .conversation import Message
from .probes import ANSWER, REASONING, TEXT, TOOL, TOOL_RESULT, USER, VALUE, answer, render_probe, tool_call
from .reasoning import REASONING_KEYS, THINK, reasoning_tags
from .stop_tokens import Ending, find_ending
from .template import ChatTemplate


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_ROLES = ("system", "user", "assistant", "tool")

_known: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, str, int, str | None], Traits]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True, slots=True)
class Traits:
    """
    How a chat template treats messages.

    Args:
        reasoning_keys (`tuple[str, ...]`):
            Keys under which the reasoning of the last turn reaches its rendering; empty if none does.
        reads_inline (`bool`):
            Whether reasoning between tags in the content is rendered as the same reasoning under a key would be; if no
            key is read, whether it is rendered between these tags alone.
        strips_inline (`bool`):
            Whether reasoning between tags in the content does not even reach the rendering of the last turn.
        reads_parts (`bool`):
            Whether reasoning in a content part of type `"thinking"` is rendered.
        string_roles (`frozenset[str]`):
            Roles whose content must be a string: a list of parts would be printed as Python writes it, or lost.
        parts_roles (`frozenset[str]`):
            Roles whose content must be a list of parts: a string would be lost.
        arguments_as_json (`bool`):
            Whether tool-call arguments must be JSON strings instead of dicts.
        needs_content (`bool`):
            Whether a message that only calls tools must have a content, be it empty.
        answer_ending ([`Ending`]):
            How an answer ends.
        calls_ending ([`Ending`]):
            How a message with tool calls ends.
    """

    reasoning_keys: tuple[str, ...]
    reads_inline: bool
    strips_inline: bool
    reads_parts: bool
    string_roles: frozenset[str]
    parts_roles: frozenset[str]
    arguments_as_json: bool
    needs_content: bool
    answer_ending: Ending
    calls_ending: Ending


def get_traits(template: ChatTemplate) -> Traits:
    """Return the traits of a chat template under its arguments, cached per tokenizer."""
    known = _known.setdefault(template.tokenizer, {})
    # Some templates keep more reasoning when there are tools.
    arguments = json.dumps([template.kwargs, bool(template.tools)], sort_keys=True, default=repr)
    key = template.source, arguments, len(template.tokenizer), template.tokenizer.eos_token
    if key not in known:
        known[key] = _Probe(replace(template, tools=[TOOL] if template.tools else None)).traits()
    return known[key]


@dataclass(frozen=True)
class _Probe:
    template: ChatTemplate

    def traits(self) -> Traits:
        as_json, needs_content = self.arguments
        keys = self.reasoning_keys()
        takes = {role: (self.takes(role, TEXT), self.takes(role, [_part("text", TEXT)])) for role in _ROLES}
        return Traits(
            reasoning_keys=keys,
            reads_inline=self.reads_inline(keys),
            strips_inline=REASONING not in render_probe(self.template, USER, self.inline()),
            reads_parts=REASONING
            in render_probe(
                self.template, USER, {**answer(), "content": [_part("thinking", REASONING), _part("text", ANSWER)]}
            ),
            string_roles=frozenset(role for role, (string, parts) in takes.items() if string and not parts),
            parts_roles=frozenset(role for role, (string, parts) in takes.items() if parts and not string),
            arguments_as_json=as_json,
            needs_content=needs_content,
            answer_ending=find_ending(self.template, answer(), USER, ANSWER),
            calls_ending=find_ending(self.template, tool_call(as_json, needs_content), TOOL_RESULT, VALUE),
        )

    def takes(self, role: str, content: object) -> bool:
        """Whether the template prints content of this form as text, rather than as a Python or JSON list."""
        before = {"system": (), "user": (), "assistant": (USER,), "tool": (USER, tool_call(*self.arguments))}[role]
        after = (USER,) if role == "system" else ()
        message = {**(TOOL_RESULT if role == "tool" else {"role": role}), "content": content}
        text = render_probe(self.template, *before, message, *after)
        return TEXT in text and not re.search(rf"""['"]text\\*['"]: \\*['"]{TEXT}""", text)

    def reasoning_keys(self) -> tuple[str, ...]:
        # The first two as in transformers >= 5.23, which fills both; the third for templates that read no other.
        for keys in (REASONING_KEYS[:2], REASONING_KEYS):
            if REASONING in render_probe(self.template, USER, answer(**dict.fromkeys(keys, REASONING))):
                return keys
        return ()

    def inline(self) -> Message:
        tags = reasoning_tags(self.template.source) or THINK
        return answer(content=f"{tags.opening}\n{REASONING}\n{tags.closing}{tags.separator}{ANSWER}")

    def reads_inline(self, keys: tuple[str, ...]) -> bool:
        under_keys = answer(**dict.fromkeys(keys, REASONING))
        if not keys:  # a template that writes tags itself must not find others in the content
            closing = (reasoning_tags(self.template.source) or THINK).closing
            written = render_probe(self.template, USER, self.inline()).rpartition(str(USER["content"]))[2]
            return REASONING in written and written.count(closing) == 1
        return all(
            _squeezed(render_probe(self.template, USER, self.inline(), *following))
            == _squeezed(render_probe(self.template, USER, under_keys, *following))
            for following in ((), (USER,))
        )

    @cached_property
    def arguments(self) -> tuple[bool, bool]:
        forms = [(as_json, needs_content) for as_json in (False, True) for needs_content in (False, True)]
        renderings = {form: render_probe(self.template, USER, tool_call(*form)) for form in forms}
        for form, text in renderings.items():
            # A dict printed by Python, or a string encoded as JSON once more, is no form that a model learned.
            if VALUE in text and f"{{'elm': '{VALUE}'}}" not in text and f'\\"{VALUE}' not in text:
                return form
        return False, not renderings[False, False]


def _part(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, kind: text}


def _squeezed(text: str) -> str:
    return "".join(text.split())
