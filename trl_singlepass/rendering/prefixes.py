"""Render every prefix of a conversation, preparing only once what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import Template, TemplateError

from .conversation import Conversation, Message
from .message_format import as_read
from .template import ChatTemplate, compiled_template


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_Way: TypeAlias = tuple[str, bool, frozenset[str]]
_Shape: TypeAlias = Any  # nested tuples of keys and types
# Ways of calling templates, and the shapes of the messages in renderings that agreed with `apply_chat_template`, or
# `None` once one did not.
_compared: dict[_Way, set[_Shape] | None] = {}
_SHAPES_KEPT = 4096
# Comparing every rendering of a conversation of a thousand turns would take minutes.
_ALL_COMPARED_UP_TO = 128
_ALWAYS_SEEN = ("messages", "tools", "documents", "add_generation_prompt")


@dataclass(frozen=True, slots=True)
class Prefixes:
    """
    The prefixes of a conversation, as a chat template renders them.

    `apply_chat_template` copies all messages and runs the template in a slow sandbox, for each prefix anew. Here,
    transformers prepares the messages once, and the template runs in a [`CachingSandbox`]. Renderings of the first
    conversation are compared with those of `apply_chat_template` (all of up to 128 messages, then of those next to a
    power of two), and so is the longest of each further one with a message of a new shape: which role, keys and types
    it has decides how the sandbox answers the template. Where one differs, or the template raises,
    `apply_chat_template` renders.
    """

    template: ChatTemplate
    messages: list[Message]
    trained: dict[int, Message] = field(default_factory=dict)
    compiled: Template | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    compares: bool = False
    known: dict[tuple[int, bool], str] = field(default_factory=dict)

    @classmethod
    def from_conversation(
        cls,
        conversation: Conversation,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        now: datetime | None = None,
        *,
        num_turns: int | None = None,
    ) -> Prefixes:
        """
        Prepare a conversation as it was read from a dataset example; the template sees the time `now`.

        `num_turns` is the number of turns to render, if it is not that of the conversation.
        """
        template = ChatTemplate.for_conversation(
            tokenizer, chat_template, conversation.tools, conversation.template_kwargs, now
        )
        forms = [as_read(message, template) for message in conversation.messages]
        messages = [message.context for message in forms]
        trained = {k: message.trained for k, message in enumerate(forms) if message.trained != message.context}
        slow = cls(template, messages, trained)
        last = max(conversation.turns, default=0)
        is_worthwhile = (len(conversation.turns) if num_turns is None else num_turns) > 1
        return slow._faster(last + 1) if is_worthwhile and _is_stock(template) else slow

    @classmethod
    def from_requests(
        cls, conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, chat_template: str | None
    ) -> list[Prefixes]:
        """
        Prepare the requests of one example, each as a conversation of its own.

        One whose contexts are beginnings of a longer one's shares what that one prepares, whatever its turns reply.
        """
        now = datetime.now()
        found: list[Prefixes | None] = [None] * len(conversations)
        for members in _with_shared_contexts(conversations):
            turns = sum(len(conversations[index].turns) for index in members)
            longest = cls.from_conversation(conversations[members[0]], tokenizer, chat_template, now, num_turns=turns)
            for index in members:
                one = conversations[index]
                replies = {k: as_read(one.messages[k], longest.template).trained for k in one.turns}
                found[index] = longest if len(members) == 1 else replace(longest, trained=replies)
        return [one for one in found if one is not None]

    def _faster(self, length: int) -> Prefixes:
        """Return the same prefixes in the fast sandbox, if it renders the longest one identically."""
        template, way = self.template, self._way
        known = _compared.get(way, set())
        if known is None:
            return self
        shapes = set(map(_shape_of_message, self.messages[:length]))
        try:
            compiled = compiled_template(template.full_source)
            if compiled is None:
                return self
            variables = {**compiled.globals, **_get_variables(template, self.messages)}
            fast = replace(self, compiled=compiled, variables=variables, compares=way not in _compared)
            if shapes <= known:
                return fast
            longest = template.render(self.messages[:length])
            agrees = fast._fast(variables["messages"][:length], False) == longest
        except Exception:  # templates may raise any exception; it is raised again when that rendering is needed
            return self
        fast.known[length, False] = longest
        if not agrees:
            _compared[way] = None
            return self
        _compared[way] = known | shapes if len(known) < _SHAPES_KEPT else known
        return fast

    @property
    def _way(self) -> _Way:
        """The way in which the template is called."""
        return self.template.source, bool(self.template.tools), frozenset(self.template.kwargs)

    def prompt(self, k: int) -> str:
        """Return the prompt of message `k`, as served."""
        return self._text(k, add_generation_prompt=True)

    def context(self, k: int) -> str:
        """Return the messages before message `k`, without a generation prompt."""
        return self._text(k)

    def through(self, k: int, last: Message | None = None) -> str:
        """Return the messages up to and including message `k`, or `last` in its place."""
        last = last or self.trained.get(k)
        if last is None or last is self.messages[k]:
            return self._text(k + 1)
        return self._rendered([*self.messages[:k], last], False, last)

    def forget(self, k: int) -> None:
        """Forget the renderings that no message after message `k` needs: kept, they would outgrow the conversation."""
        for key in [key for key in self.known if key[0] <= k]:
            del self.known[key]

    def _text(self, length: int, add_generation_prompt: bool = False) -> str:
        key = length, add_generation_prompt
        if key not in self.known:
            self.known[key] = self._rendered(self.messages[:length], add_generation_prompt)
        return self.known[key]

    def _rendered(self, messages: list[Message], add_generation_prompt: bool, last: Message | None = None) -> str:
        if self.compiled is None:
            return self.template.render(messages, add_generation_prompt)
        try:
            prepared = self.variables["messages"][: len(messages)]
            if last is not None:
                prepared[-1:] = _get_variables(self.template, [last])["messages"]
            text = self._fast(prepared, add_generation_prompt)
        except Exception:  # `apply_chat_template` renders the same text, or raises
            return self.template.render(messages, add_generation_prompt)
        is_compared = self.compares and _is_compared(len(messages))
        return self._compared(text, messages, add_generation_prompt) if is_compared else text

    def _fast(self, messages: list[Message], add_generation_prompt: bool) -> str:
        assert self.compiled is not None
        variables = {**self.variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        context = self.compiled.new_context(variables, shared=True)  # jinja's globals are among the variables
        return "".join(self.compiled.root_render_func(context))

    def _compared(self, text: str, messages: list[Message], add_generation_prompt: bool) -> str:
        expected = self.template.render(messages, add_generation_prompt)
        if text != expected:
            _compared[self._way] = None
        return expected


def _shape_of_message(message: Message) -> _Shape:
    return message.get("role"), _shape(message)


def _shape(value: Any) -> _Shape:
    """Return the keys and types of a value."""
    if isinstance(value, dict):
        return tuple([(key, _shape(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return type(value), frozenset(map(_shape, value))
    return type(value)


def _with_shared_contexts(conversations: Sequence[Conversation]) -> list[list[int]]:
    """Group conversations, by index, with one that begins with the contexts of the others: it stands first."""
    numbers: dict[str, int] = {}  # of equal messages; `1 == True`, but a template prints them differently
    said = [
        [numbers.setdefault(repr(part), len(numbers)) for part in (one.tools, one.template_kwargs, *one.messages)]
        for one in conversations
    ]
    contexts = [said[index][: 2 + max(one.turns, default=0)] for index, one in enumerate(conversations)]
    groups: list[list[int]] = []
    for index in sorted(range(len(conversations)), key=lambda index: -len(contexts[index])):
        length = len(contexts[index])
        group = next((group for group in groups if contexts[group[0]][:length] == contexts[index]), [])
        groups += [] if group else [group]
        group.append(index)
    return groups


def _is_compared(num_messages: int) -> bool:
    """Whether a rendering of that many messages is among those that are compared: of long ones, a few."""
    # A power of two, or one more: in a chat, all prompts have an odd number of messages, or all have an even one.
    is_near_power_of_two = 1 in (num_messages.bit_count(), (num_messages - 1).bit_count())
    return num_messages <= _ALL_COMPARED_UP_TO or is_near_power_of_two


def _is_stock(template: ChatTemplate) -> bool:
    """Whether transformers' own code calls the template, with all arguments visible to it as variables."""
    from transformers import PreTrainedTokenizerBase

    method = getattr(template.tokenizer.apply_chat_template, "__func__", None)
    if method is not PreTrainedTokenizerBase.apply_chat_template:
        return False
    return all(name.isidentifier() and name not in _get_parameters(method) for name in template.kwargs)


@cache
def _get_parameters(function: Any) -> frozenset[str]:
    return frozenset(signature(function).parameters)


def _get_variables(template: ChatTemplate, messages: list[Message]) -> dict[str, Any]:
    """Return the variables that transformers passes to a template, by rendering a template that raises them."""
    names = dict.fromkeys([*_ALWAYS_SEEN, *template.tokenizer.special_tokens_map, *template.arguments])
    teller = "{{ raise_exception({" + ", ".join(f"'{name}': {name}" for name in names) + "}) }}"
    try:
        template.tokenizer.apply_chat_template(
            messages, tools=template.tools, chat_template=teller, tokenize=False, **template.arguments
        )
    except TemplateError as error:
        seen: dict[str, Any] = error.args[0]
        return seen
    raise AssertionError("raise_exception raises")
