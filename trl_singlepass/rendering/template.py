"""A chat template as one conversation calls it: with its tools, its arguments and a clock that stands still."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .clock import freeze, reads_clock, with_frozen_clock
from .conversation import Message, RenderingError, Tools
from .reasoning import ReasoningTags, reasoning_tags
from .validation import missing_parts


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatTemplate:
    """
    A chat template with the tools and arguments of one conversation.

    All turns of a conversation see the same time, or their prompts would differ at the start wherever a template
    prints it.
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
        try:
            source = tokenizer.get_chat_template(chat_template, tools)
        except ValueError as error:
            raise RenderingError(
                f"The tokenizer has no chat template to render conversations with: {error}"
            ) from error
        return cls(tokenizer, source, tools, kwargs, now or datetime.now())

    @property
    def full_source(self) -> str:
        """The template, reading the frozen clock if it reads any."""
        return with_frozen_clock(self.source)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """All further arguments that the template is called with."""
        return {"frozen_clock": freeze(self.now), **self.kwargs} if reads_clock(self.source) else self.kwargs

    @cached_property
    def tags(self) -> ReasoningTags | None:
        """Tags that the template knows around reasoning."""
        return reasoning_tags(self.source)

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """
        Return the text of a conversation. Whatever the template raises to refuse the messages becomes a
        `RenderingError`.
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


def with_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> PreTrainedTokenizerBase:
    """Return a tokenizer with another chat template, or the tokenizer itself if there is none to give it."""
    if chat_template is None:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer
