"""A chat template at work on one conversation: which form of a message it reads, and what it renders."""

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from .conversation import Message, RenderingError
from .reasoning import (
    REASONING_KEYS,
    THINK,
    ReasoningTags,
    Spoken,
    build_completion,
    reasoning_tags,
    with_reasoning_inline,
    with_reasoning_key,
)
from .tokenization import common_length, hard_borders
from .traits import Traits, traits_of


# Directives of strftime: a template prints date and time through them, so they are what has to stand still.
_DIRECTIVES = [f"%{dash}{letter}" for letter in "aAbBcdDefFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ" for dash in ("-", "")]
# A macro of this name takes the place of transformers' function, which looks at the clock at every call. The newline
# after it is swallowed by `trim_blocks`, so the template itself begins at the start of a line.
_FROZEN_CLOCK = """{%- macro strftime_now(format) -%}
{%- set clock = namespace(text=format) -%}
{%- for directive, value in frozen_clock.items() -%}
{%- set clock.text = clock.text | replace(directive, value) -%}
{%- endfor -%}
{{- clock.text -}}
{%- endmacro %}
"""


@dataclass(frozen=True)
class ChatTemplate:
    """
    A tokenizer's chat template, with the tools and arguments of one conversation and with the clock stopped.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer whose `apply_chat_template` renders.
        source (`str`):
            The template.
        tools (`list`, *optional*):
            Tools of the conversation.
        kwargs (`dict`):
            Further arguments of the template.
        clock (`dict[str, str]`):
            What each directive of strftime that the template uses prints.
    """

    tokenizer: Any
    source: str
    tools: list[Any] | None
    kwargs: dict[str, Any]
    clock: dict[str, str]

    @classmethod
    def of(
        cls, tokenizer: Any, chat_template: str | None, tools: list[Any] | None, kwargs: dict[str, Any]
    ) -> "ChatTemplate":
        """Return the template that `tokenizer` uses for a conversation, with the clock stopped at this moment."""
        source = tokenizer.get_chat_template(chat_template, tools)
        now, prints_time = datetime.now(), "strftime_now" in source
        clock = {name: now.strftime(name) for name in _DIRECTIVES if prints_time and name in source}
        return cls(tokenizer, source, tools, kwargs, clock)

    @property
    def full_source(self) -> str:
        """The template with the clock that it looks at."""
        return _FROZEN_CLOCK + self.source if self.clock else self.source

    @property
    def arguments(self) -> dict[str, Any]:
        """All further arguments that the template is called with."""
        return {"frozen_clock": self.clock, **self.kwargs} if self.clock else self.kwargs

    @cached_property
    def traits(self) -> Traits:
        """How the template treats assistant messages."""
        return traits_of(self)

    @cached_property
    def tags(self) -> ReasoningTags | None:
        """Marks that the template knows around reasoning."""
        return reasoning_tags(self.source)

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, or raise what the template raises."""
        text: str = self.tokenizer.apply_chat_template(
            messages,
            tools=self.tools,
            chat_template=self.full_source,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **self.arguments,
        )
        return text

    def adapt(self, message: Message) -> Message:
        """Return a message in the form that the template reads: the same in what it says."""
        message = {key: value for key, value in message.items() if value is not None}
        if message.get("role") != "assistant":
            return message
        traits = self.traits
        if message.get("tool_calls"):
            message = {**message, "tool_calls": [_adapt_call(call, traits) for call in message["tool_calls"]]}
            message = {"content": "", **message} if traits.needs_content else message
        said = self.spoken(message)
        return self._with_reasoning_where_read(message, said) if said.reasoning else message

    def spoken(self, message: Message) -> Spoken:
        """Return what an assistant message says."""
        return Spoken.of(message, self.tags)

    def add_reasoning(self, prompt: str, bare: str, said: Spoken) -> str | None:
        """Return a prompt and what follows it in a rendering without reasoning, with the reasoning, if it can be."""
        tags = self.tags
        if tags is None:
            return None
        own_lines = tags.own_lines
        if own_lines is None:
            own_lines = any(tags.opening + newline in self.source for newline in ("\n", "\\n"))
        completion = build_completion(prompt, bare, said.reasoning, tags, own_lines)
        return None if completion is None else prompt + completion

    def _with_reasoning_where_read(self, message: Message, said: Spoken) -> Message:
        traits, tags = self.traits, self.tags
        takes_inline = traits.reads_inline or (traits.strips_inline and not traits.reasoning_keys)
        if said.inline and takes_inline and tags in (None, THINK):
            return message
        if not said.inline and not traits.reasoning_keys and traits.reads_inline and tags:
            return with_reasoning_inline(message, said, tags)
        # Where no key is read, transformers' choice of keys: some templates read them beside tool calls only.
        return with_reasoning_key(message, said, traits.reasoning_keys or REASONING_KEYS[:2])

    def reasoning_end(self, prompt: str, rendering: str, said: Spoken) -> int:
        """Return where the reasoning that begins a completion ends, closing mark included; 0 if none begins it."""
        start = common_length(prompt, rendering)
        found = rendering.find(said.reasoning, start) if said.reasoning else -1
        if found < 0 or (start < len(prompt) and rendering[start:found].strip()):
            return 0  # where a rendering departs from its prompt early, earlier messages come first
        end = found + len(said.reasoning)
        mark = len(rendering) - len(rendering[end:].lstrip())
        # gpt-oss closes reasoning by a special token that closes other parts as well: no tag of its own.
        tags = [self.tags.closing] if self.tags else []
        closing = [*tags, *hard_borders(self.tokenizer, self.source).tokens]
        return next((mark + len(tag) for tag in closing if rendering.startswith(tag, mark)), end)

    def stop_after(self, said: Spoken) -> str:
        """Return what must follow a message so that it ends in a stop token."""
        stop = self.traits.stop_after_calls if said.calls else self.traits.stop_after_answer
        if stop is None:
            raise RenderingError(
                "the chat template writes no stop token after it and the tokenizer has no EOS token, so the model "
                "would never learn to stop. Set tokenizer.eos_token."
            )
        return stop


def _adapt_call(call: dict[str, Any], traits: Traits) -> dict[str, Any]:
    function = dict(call.get("function") or call)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and not traits.arguments_as_json:
        decoded = _decoded_object(arguments)
        function["arguments"] = arguments if decoded is None else decoded
    elif isinstance(arguments, dict) and traits.arguments_as_json:
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": function} if call.get("function") else function


def _decoded_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None  # models do write calls that are no JSON: the template may still print them
    return value if isinstance(value, dict) else None
