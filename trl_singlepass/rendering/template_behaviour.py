"""How a chat template treats messages, found by rendering small conversations with it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from .conversation import Message
from .probes import ANSWER, REASONING, TOOL, USER, VALUE, Probe, part, prints_object
from .reasoning import REASONING_KEYS, THINK, ReasoningTags
from .stop_tokens import Ending, find_ending, find_stops
from .template import ChatTemplate, TemplateKey
from .tokenization import common_length, split_markup


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_known: WeakKeyDictionary[PreTrainedTokenizerBase, dict[TemplateKey, TemplateBehaviour]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class ShapeBehaviour:
    """
    How a chat template treats messages of one shape: plain answers, or messages that call tools.

    The reasoning of the last turn reaches its rendering under `reasoning_keys`, and as reasoning from a content part
    of type `"thinking"` if it `reads_parts`. Between tags in the content, it is rendered as under a key, but for white
    space, if the template `reads_inline` (where it reads no key: in the place where the model writes it);
    `strips_inline` says that it does not even reach the last turn, `keeps_inline` that it is still shown when another
    message follows.
    """

    reasoning_keys: tuple[str, ...]
    reads_parts: bool
    reads_inline: bool
    strips_inline: bool
    keeps_inline: bool
    ending: Ending


@dataclass(frozen=True, slots=True)
class TemplateBehaviour:
    """
    How a chat template treats messages.

    Content of `string_roles` must be a string: a list of parts would be printed as Python writes it, or lost. That of
    `parts_roles` must be a list; a list with strings in it stays as it is in `kept_lists`, such as results that are
    printed as JSON. With `arguments_as_json`, arguments of calls must be JSON. With `needs_content`, a message that
    only calls tools must have a content, be it empty. A completion may end at one of `stops`. A template that
    `counts_back` numbers messages from the end of the conversation, so that the number of a message changes.
    """

    answers: ShapeBehaviour
    calls: ShapeBehaviour
    string_roles: frozenset[str]
    parts_roles: frozenset[str]
    kept_lists: frozenset[str]
    counts_back: bool
    arguments_as_json: bool
    needs_content: bool
    stops: frozenset[str]

    @property
    def reasoning_keys(self) -> tuple[str, ...]:
        """Keys under which some messages' reasoning reaches their rendering; empty if none does."""
        return max(self.answers.reasoning_keys, self.calls.reasoning_keys, key=len)


def get_behaviour(template: ChatTemplate) -> TemplateBehaviour:
    """Return how a chat template behaves under its arguments, cached per tokenizer."""
    known = _known.setdefault(template.tokenizer, {})
    if template.key not in known:
        known[template.key] = _measure(Probe(replace(template, tools=[TOOL] if template.tools else None)))
    return known[template.key]


def _measure(probe: Probe) -> TemplateBehaviour:
    takes, (arguments_as_json, needs_content) = probe.takes, probe.call_form
    answers = _Shape(probe, probe.answer(), probe.user, ANSWER)
    calls = _Shape(probe, probe.tool_call(), probe.tool_result, VALUE)
    within = answers.after_reasoning
    measured = answers.behaviour(within), calls.behaviour(within)
    return TemplateBehaviour(
        answers=measured[0],
        calls=measured[1],
        string_roles=frozenset(role for role, (string, parts) in takes.items() if string and not parts),
        parts_roles=frozenset(role for role, (string, parts) in takes.items() if parts and not string),
        kept_lists=frozenset(filter(probe.keeps_lists, takes)),
        counts_back=_counts_back(probe),
        arguments_as_json=arguments_as_json,
        needs_content=needs_content,
        stops=find_stops(probe.template, [shape.ending for shape in measured], within),
    )


def _counts_back(probe: Probe) -> bool:
    """Whether a conversation's numbers change when it goes on."""
    turn = probe.user, probe.answer()
    numbers, continued = (re.findall(r"\d+", probe.render(*turn * count)) for count in (1, 2))
    return bool(continued) and continued[: len(numbers)] != numbers


@dataclass(frozen=True)
class _Shape:
    """Measures messages of one shape: an example without reasoning, a message that may follow, and its last word."""

    probe: Probe
    message: Message
    following: Message
    last_word: str

    def behaviour(self, within: frozenset[str]) -> ShapeBehaviour:
        keys, inline = self.reasoning_keys, self.rendered(self.inline)
        return ShapeBehaviour(
            reasoning_keys=keys,
            reads_parts=self.shows(self.in_part),
            reads_inline=self.equals_key(keys) if keys else self.stands_in_place(inline),
            strips_inline=bool(inline) and REASONING not in inline,
            keeps_inline=REASONING in self.rendered(self.inline, self.following),
            ending=find_ending(self.probe, self.message, self.following, self.last_word, within),
        )

    def rendered(self, *messages: Message) -> str:
        return self.probe.render(self.probe.user, *messages)

    @cached_property
    def reasoning_keys(self) -> tuple[str, ...]:
        # The first two as in transformers >= 5.23, which fills both; the third for templates that read no other.
        several = (REASONING_KEYS[:2], REASONING_KEYS)
        return next((keys for keys in several if self.shows({**self.message, **dict.fromkeys(keys, REASONING)})), ())

    @property
    def in_part(self) -> Message:
        answer = [part("text", ANSWER)] if self.last_word == ANSWER else []
        return {**self.message, "content": [part("thinking", REASONING), *answer]}

    @property
    def inline(self) -> Message:
        content = self.tags.around(REASONING) + (ANSWER if self.last_word == ANSWER else "")
        return {**self.message, "content": self.probe.answer(content)["content"]}

    @property
    def tags(self) -> ReasoningTags:
        return self.probe.template.tags or THINK

    def shows(self, message: Message) -> bool:
        """Whether a rendering shows reasoning as reasoning: apart from what follows, and not as a printed object."""
        return bool(self.markup_after_reasoning(message).strip())

    def markup_after_reasoning(self, message: Message) -> str:
        text = self.rendered(message)
        _, found, rest = text.rpartition(REASONING)
        return rest.partition(self.last_word)[0] if found and not prints_object(text, REASONING) else ""

    @property
    def after_reasoning(self) -> frozenset[str]:
        """Tokens between reasoning and answer: the model goes on after them."""
        keys = dict.fromkeys(self.reasoning_keys, REASONING)
        forms = [{**self.message, **keys}, self.in_part, self.inline]
        markup = next((text for text in map(self.markup_after_reasoning, forms) if text), "")
        pieces = {piece for piece in split_markup(markup, self.probe.template.tokenizer) if piece.strip()}
        return frozenset(pieces & self.probe.template.tokenizer.get_added_vocab().keys() | {self.tags.closing})

    def equals_key(self, keys: tuple[str, ...]) -> bool:
        """Whether inline reasoning is rendered as it is under its keys, in the last message and in history."""
        under_keys = {**self.message, **dict.fromkeys(keys, REASONING)}
        return all(
            _squeezed(self.rendered(self.inline, *following)) == _squeezed(self.rendered(under_keys, *following))
            for following in ((), (self.following,))
        )

    def stands_in_place(self, inline: str) -> bool:
        """Whether inline reasoning follows the prompt, and no other end of reasoning stands there."""
        opening, closing = self.tags.opening, self.tags.closing
        prompt = self.probe.render(self.probe.user, add_generation_prompt=True)
        head, found, _ = inline.rpartition(REASONING)
        before = head.rstrip().removesuffix(opening)
        own = before[common_length(before, prompt) :].strip()
        return bool(found) and not own and inline.rpartition(USER)[2].count(closing) == 1


def _squeezed(text: str) -> str:
    return "".join(text.split())
