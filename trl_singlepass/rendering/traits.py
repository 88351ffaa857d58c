"""How a chat template treats messages, found by rendering small conversations with it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from .conversation import Message, RenderingError
from .reasoning import REASONING_KEYS, THINK, reasoning_tags
from .template import ChatTemplate


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Words that no template contains.
_ANSWER, _REASONING, _VALUE, _TEXT = "Aspen", "Rowan", "Maple", "Willow"
_USER: Message = {"role": "user", "content": "Juniper"}
_TOOL_RESULT: Message = {"role": "tool", "name": "oak", "tool_call_id": "call00000", "content": "Linden"}
_PARAMETERS = {"type": "object", "properties": {"elm": {"type": "string", "description": "Elm"}}, "required": ["elm"]}
_TOOL = {"type": "function", "function": {"name": "oak", "description": "Oak", "parameters": _PARAMETERS}}
# Special tokens that close a part of a message rather than the message.
_CLOSES_A_PART = re.compile("^</|^\\[/|[_\u2581]end[|\uff5c]>$|^<[a-z_]+\\|>$")
_ROLES = ("system", "user", "assistant", "tool")

_known: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, str, int, str | None], Traits]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True, slots=True)
class Ending:
    """
    How a message ends.

    Args:
        written (`str`):
            What the template writes at the end of a conversation's last message.
        trained (`str`, *optional*):
            What replaces it in a completion: the same text, plus a stop token if the template writes none, minus the
            next message's header if it writes that. `None` if there is no token to stop at.
    """

    written: str
    trained: str | None


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
        known[key] = _Probe(replace(template, tools=[_TOOL] if template.tools else None)).traits()
    return known[key]


@dataclass(frozen=True)
class _Probe:
    template: ChatTemplate

    def traits(self) -> Traits:
        as_json, needs_content = self.arguments
        keys = self.reasoning_keys()
        takes = {role: (self.takes(role, _TEXT), self.takes(role, [_part("text", _TEXT)])) for role in _ROLES}
        return Traits(
            reasoning_keys=keys,
            reads_inline=self.reads_inline(keys),
            strips_inline=_REASONING not in self.text(_USER, self.inline()),
            reads_parts=_REASONING
            in self.text(_USER, {**_answer(), "content": [_part("thinking", _REASONING), _part("text", _ANSWER)]}),
            string_roles=frozenset(role for role, (string, parts) in takes.items() if string and not parts),
            parts_roles=frozenset(role for role, (string, parts) in takes.items() if parts and not string),
            arguments_as_json=as_json,
            needs_content=needs_content,
            answer_ending=self.ending(_answer(), _USER, _ANSWER),
            calls_ending=self.ending(_calling(as_json, needs_content), _TOOL_RESULT, _VALUE),
        )

    def text(self, *messages: Message, add_generation_prompt: bool = False) -> str:
        """Return a rendering, or an empty string if the template refuses the messages."""
        try:
            return self.template.render(list(messages), add_generation_prompt)
        except RenderingError:
            return ""

    def takes(self, role: str, content: object) -> bool:
        """Whether the template prints content of this form as text, rather than as a Python or JSON list."""
        before = {"system": (), "user": (), "assistant": (_USER,), "tool": (_USER, _calling(*self.arguments))}[role]
        after = (_USER,) if role == "system" else ()
        message = {**(_TOOL_RESULT if role == "tool" else {"role": role}), "content": content}
        text = self.text(*before, message, *after)
        return _TEXT in text and not re.search(rf"""['"]text\\*['"]: \\*['"]{_TEXT}""", text)

    def reasoning_keys(self) -> tuple[str, ...]:
        # The first two as in transformers >= 5.23, which fills both; the third for templates that read no other.
        for keys in (REASONING_KEYS[:2], REASONING_KEYS):
            if _REASONING in self.text(_USER, _answer(**dict.fromkeys(keys, _REASONING))):
                return keys
        return ()

    def inline(self) -> Message:
        tags = reasoning_tags(self.template.source) or THINK
        return _answer(content=f"{tags.opening}\n{_REASONING}\n{tags.closing}{tags.separator}{_ANSWER}")

    def reads_inline(self, keys: tuple[str, ...]) -> bool:
        under_keys = _answer(**dict.fromkeys(keys, _REASONING))
        if not keys:  # a template that writes tags itself must not find others in the content
            closing = (reasoning_tags(self.template.source) or THINK).closing
            written = self.text(_USER, self.inline()).rpartition(str(_USER["content"]))[2]
            return _REASONING in written and written.count(closing) == 1
        return all(
            _squeezed(self.text(_USER, self.inline(), *following))
            == _squeezed(self.text(_USER, under_keys, *following))
            for following in ((), (_USER,))
        )

    @cached_property
    def arguments(self) -> tuple[bool, bool]:
        forms = [(as_json, needs_content) for as_json in (False, True) for needs_content in (False, True)]
        renderings = {form: self.text(_USER, _calling(*form)) for form in forms}
        for form, text in renderings.items():
            # A dict printed by Python, or a string encoded as JSON once more, is no form that a model learned.
            if _VALUE in text and f"{{'elm': '{_VALUE}'}}" not in text and f'\\"{_VALUE}' not in text:
                return form
        return False, not renderings[False, False]

    def ending(self, message: Message, following: Message, last_word: str) -> Ending:
        """Return how a message ends whose last word is given; unchanged if the template does not render the word."""
        text = self.text(_USER, message)
        _, found, rest = text.rpartition(last_word)
        if not found:
            return Ending("", "")
        calls = last_word == _VALUE
        written = self.trailing_markup(rest) if calls else rest
        eos: str | None = self.template.tokenizer.eos_token
        if eos and eos in written:  # what follows it begins the next message, but for white space
            start, _, after = written.partition(eos)
            return Ending(written, start + eos + (after if not after.strip() else ""))
        stop = self.without_header(written)
        last = self.pieces(stop.strip())[-1:]
        if last and self.closes_reasoning(last[0]):  # then the model goes on after it: gpt-oss writes such histories
            return Ending(written, stop.rstrip().removesuffix(last[0]) + eos if eos else None)
        if self.is_stop(last[0]) if calls and last else last:
            return Ending(written, stop)
        token = self.next_token(message, following)
        return Ending(written, None if token is None else stop + token)

    def is_stop(self, token: str) -> bool:
        """Whether a model stops at a token that the template writes behind tool calls."""
        ending = self.text(_USER, _answer()).rpartition(_ANSWER)[2].strip()
        known = self.template.tokenizer.added_tokens_decoder.values()
        special = {added.content for added in known if added.special and not _CLOSES_A_PART.search(added.content)}
        return token in special or bool(ending and ending.endswith(token))

    def closes_reasoning(self, token: str) -> bool:
        """Whether a token that ends an answer also stands between its reasoning and the answer."""
        reasoning = dict.fromkeys(REASONING_KEYS, _REASONING)
        _, found, after = self.text(_USER, _answer(**reasoning)).rpartition(_REASONING)
        return bool(found) and token in after.partition(_ANSWER)[0]

    def without_header(self, ending: str) -> str:
        """Drop the header of the next answer, which some templates write whether or not it was requested."""
        bare = self.text(_USER)
        if not bare or bare != self.text(_USER, add_generation_prompt=True):
            return ending
        own, header = self.pieces(ending), self.pieces(bare.rpartition(str(_USER["content"]))[2])
        while own and header and own[-1] == header[-1]:
            own.pop()
            header.pop()
        return "".join(own)

    def trailing_markup(self, text: str) -> str:
        pieces, added = self.pieces(text), self.template.tokenizer.get_added_vocab()
        is_text = [bool(piece.strip()) and piece not in added and piece[:1] not in ("<", "[") for piece in pieces]
        return "".join(pieces[max((i + 1 for i, text in enumerate(is_text) if text), default=0) :])

    def pieces(self, text: str) -> list[str]:
        return split_markup(text, self.template.tokenizer)

    def next_token(self, message: Message, following: Message) -> str | None:
        """The token that history shows after a message, or else EOS."""
        last, history = self.text(_USER, message), self.text(_USER, message, following)
        rest = history[len(last) :].lstrip() if history.startswith(last) else ""
        tokens = sorted(self.template.tokenizer.get_added_vocab(), key=len, reverse=True)
        eos: str | None = self.template.tokenizer.eos_token
        return next((token for token in tokens if rest.startswith(token)), eos)


def split_markup(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Split markup into added tokens, tags, words and single characters: pieces that must not be split further."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    return re.findall("|".join([*map(re.escape, added), r"<[^<>\s]*>", r"\[[^\[\]\s]*\]", r"\w+", r"\s", "."]), text)


def _part(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, kind: text}


def _answer(**fields: str) -> Message:
    return {"role": "assistant", "content": _ANSWER, **fields}


def _calling(as_json: bool, with_content: bool) -> Message:
    arguments = {"elm": _VALUE}
    function = {"name": "oak", "arguments": json.dumps(arguments) if as_json else arguments}
    call = {"id": "call00000", "type": "function", "function": function}
    message: Message = {"role": "assistant", "tool_calls": [call]}
    return {**message, "content": ""} if with_content else message


def _squeezed(text: str) -> str:
    return "".join(text.split())
