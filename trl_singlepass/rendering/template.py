"""A chat template as one conversation calls it: with its tools, its arguments and a clock that stands still."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .conversation import Message, RenderingError, Tools
from .reasoning import ReasoningTags, reasoning_tags
from .validation import missing_parts


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Directives of strftime: a template prints date and time through them, so they are what has to stand still. It may put
# a format together from parts, so all of them are frozen, not only those that it spells out.
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
    A chat template with the tools and arguments of one conversation.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer whose `apply_chat_template` renders.
        source (`str`):
            The template.
        tools (`list`, *optional*):
            Tools of the conversation.
        kwargs (`dict`):
            Further arguments of the template.
        now (`datetime`):
            The time that the template sees. All turns of a conversation see the same, or their prompts would differ
            at the start wherever a template prints the time.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str
    tools: Tools | None
    kwargs: dict[str, Any]
    now: datetime

    @classmethod
    def for_conversation(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        tools: Tools | None,
        kwargs: dict[str, Any],
        now: datetime | None = None,
    ) -> ChatTemplate:
        """Return the template that `tokenizer` uses for a conversation, with the clock stopped at `now`."""
        source = tokenizer.get_chat_template(chat_template, tools)
        return cls(tokenizer, source, tools, kwargs, now or datetime.now())

    @property
    def reads_clock(self) -> bool:
        """Whether the template prints the date or the time."""
        return "strftime_now" in self.source

    @property
    def full_source(self) -> str:
        """The template with the frozen clock that it looks at."""
        return _FROZEN_CLOCK + self.source if self.reads_clock else self.source

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """All further arguments that the template is called with."""
        if not self.reads_clock:
            return self.kwargs
        return {"frozen_clock": {name: self.now.strftime(name) for name in _DIRECTIVES}, **self.kwargs}

    @cached_property
    def tags(self) -> ReasoningTags | None:
        """Tags that the template knows around reasoning."""
        return reasoning_tags(self.source)

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """
        Return the text of a conversation.

        Raises:
            `RenderingError`: If the template refuses the messages, whatever it raises.
        """
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=self.tools,
                chat_template=self.full_source,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.arguments,
            )
        except Exception as error:  # templates may raise any exception, from TemplateError to TypeError
            missing = missing_parts(error, messages, self.tools)
            raise RenderingError(f"the template refuses the conversation up to it: {error!r}{missing}") from error
        return text
