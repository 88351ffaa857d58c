"""How a chat template treats assistant messages, found by rendering small conversations with it."""

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .conversation import Message
from .reasoning import REASONING_KEYS, THINK, reasoning_tags


if TYPE_CHECKING:
    from .template import ChatTemplate

# Words that no template writes itself.
_ANSWER, _REASONING, _VALUE = "Aspen", "Rowan", "Maple"
_USER: Message = {"role": "user", "content": "Juniper"}
_TOOL_RESULT: Message = {"role": "tool", "name": "oak", "tool_call_id": "call00000", "content": "Linden"}
_PARAMETERS = {"type": "object", "properties": {"elm": {"type": "string", "description": "Elm"}}, "required": ["elm"]}
_TOOL = {"type": "function", "function": {"name": "oak", "description": "Oak", "parameters": _PARAMETERS}}
# Special tokens that close a part of a message rather than the message.
_CLOSES_A_PART = re.compile("^</|^\\[/|[_\u2581]end[|\uff5c]>$|^<[a-z_]+\\|>$")

_known: WeakKeyDictionary[Any, dict[tuple[str, str, int, str | None], "Traits"]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Traits:
    """
    How a chat template treats assistant messages.

    Args:
        reasoning_keys (`tuple[str, ...]`):
            Keys under which the reasoning of the last turn reaches its rendering; empty if none does.
        reads_inline (`bool`):
            Whether reasoning between tags in the content is rendered as the same reasoning under a key would be; if no
            key is read, whether it is rendered between these tags alone.
        strips_inline (`bool`):
            Whether reasoning between tags in the content does not even reach the rendering of the last turn.
        arguments_as_json (`bool`):
            Whether tool-call arguments must be JSON strings instead of dicts.
        needs_content (`bool`):
            Whether a message that only calls tools must have a content, be it empty.
        stop_after_answer (`str`, *optional*):
            What to add to an answer so that it ends in a stop token: nothing where the template writes one. `None` if
            neither the template nor the tokenizer has one.
        stop_after_calls (`str`, *optional*):
            The same for tool calls.
    """

    reasoning_keys: tuple[str, ...]
    reads_inline: bool
    strips_inline: bool
    arguments_as_json: bool
    needs_content: bool
    stop_after_answer: str | None
    stop_after_calls: str | None


def traits_of(template: "ChatTemplate") -> Traits:
    """Return the traits of a chat template under its arguments, from memory where its tokenizer has met it before."""
    known = _known.setdefault(template.tokenizer, {})
    # Some templates keep more reasoning when there are tools.
    arguments = json.dumps([template.kwargs, bool(template.tools)], sort_keys=True, default=repr)
    key = template.source, arguments, len(template.tokenizer), template.tokenizer.eos_token
    if key not in known:
        known[key] = _Probe(replace(template, tools=[_TOOL] if template.tools else None)).traits()
    return known[key]


@dataclass(frozen=True, slots=True)
class _Probe:
    template: "ChatTemplate"

    def traits(self) -> Traits:
        as_json, needs_content = self.arguments()
        keys = self.reasoning_keys()
        return Traits(
            reasoning_keys=keys,
            reads_inline=self.reads_inline(keys),
            strips_inline=_REASONING not in self.render(_USER, self.inline()),
            arguments_as_json=as_json,
            needs_content=needs_content,
            stop_after_answer=self.missing_stop_after_answer(),
            stop_after_calls=self.missing_stop_after_calls(_calling(as_json, needs_content)),
        )

    def render(self, *messages: Message) -> str:
        """Return a rendering; nothing where the template refuses the messages, which then say nothing of it."""
        try:
            return self.template.render(list(messages))
        except Exception:  # templates raise what they like, from TemplateError to TypeError
            return ""

    def reasoning_keys(self) -> tuple[str, ...]:
        # The first two as in transformers >= 5.23, which fills both; the third for templates that read no other.
        for keys in (REASONING_KEYS[:2], REASONING_KEYS):
            if _REASONING in self.render(_USER, _answer(**dict.fromkeys(keys, _REASONING))):
                return keys
        return ()

    def inline(self) -> Message:
        tags = reasoning_tags(self.template.source) or THINK
        return _answer(content=f"{tags.opening}\n{_REASONING}\n{tags.closing}{tags.separator}{_ANSWER}")

    def reads_inline(self, keys: tuple[str, ...]) -> bool:
        under_keys = _answer(**dict.fromkeys(keys, _REASONING))
        if not keys:  # a template that writes tags itself must not find others in the content
            closing = (reasoning_tags(self.template.source) or THINK).closing
            written = self.render(_USER, self.inline()).rpartition(str(_USER["content"]))[2]
            return _REASONING in written and written.count(closing) == 1
        return all(
            _squeezed(self.render(_USER, self.inline(), *following))
            == _squeezed(self.render(_USER, under_keys, *following))
            for following in ((), (_USER,))
        )

    def arguments(self) -> tuple[bool, bool]:
        forms = [(as_json, needs_content) for as_json in (False, True) for needs_content in (False, True)]
        renderings = {form: self.render(_USER, _calling(*form)) for form in forms}
        for form, text in renderings.items():
            # A dict printed by Python, or a string encoded as JSON once more, is no form that a model learned.
            if _VALUE in text and f"{{'elm': '{_VALUE}'}}" not in text and f'\\"{_VALUE}' not in text:
                return form
        return False, not renderings[False, False]

    def missing_stop_after_answer(self) -> str | None:
        written = self.ending()
        return "" if written is None or written else self.next_token(_answer(), _USER)

    def missing_stop_after_calls(self, call: Message) -> str | None:
        ending = self.render(_USER, call).rstrip()
        if _VALUE not in ending or (self.ending() and ending.endswith(self.ending() or "")):
            return ""
        tokens = self.template.tokenizer.added_tokens_decoder.values()
        stops = [token.content for token in tokens if token.special and not _CLOSES_A_PART.search(token.content)]
        stops += [self.template.tokenizer.eos_token] if self.template.tokenizer.eos_token else []  # it may be "</s>"
        return "" if ending.endswith(tuple(stops)) else self.next_token(call, _TOOL_RESULT)

    def ending(self) -> str | None:
        """What the template writes after an answer; `None` if it does not render answers that are strings."""
        _, found, ending = self.render(_USER, _answer()).rpartition(_ANSWER)
        return ending.strip() if found else None

    def next_token(self, message: Message, following: Message) -> str | None:
        """The token that history shows after a message, or else EOS."""
        last, history = self.render(_USER, message), self.render(_USER, message, following)
        rest = history[len(last) :].lstrip() if history.startswith(last) else ""
        tokens = sorted(self.template.tokenizer.get_added_vocab(), key=len, reverse=True)
        eos: str | None = self.template.tokenizer.eos_token
        return next((token for token in tokens if rest.startswith(token)), eos)


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
