"""What earlier turns look like in the context of a later one: as the template has it, with all reasoning, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from ..trees.sample import Sample
from .conversation import Conversation, Message, RenderingError
from .message_format import as_read
from .prefixes import Prefixes
from .reasoning import ParsedMessage, reasoning_tags, without_reasoning
from .samples import has_prompt, render_conversation
from .template import ChatTemplate


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


History = Literal["template", "keep", "strip"]
HISTORIES: tuple[History, ...] = ("template", "keep", "strip")

# The switches of public templates, with the value that keeps reasoning; the other value strips it.
_KEEPING_SWITCHES: Mapping[str, bool] = {
    "preserve_thinking": True,  # Qwen3.6, Qwen3.8, LFM2.5
    "preserved_thinking": True,  # Hunyuan 3
    "clear_thinking": False,  # GLM-4.7, GLM-5
    "truncate_history_thinking": False,  # Nemotron 3
    "drop_thinking": False,  # DeepSeek-V4
    "skip_think": False,  # EXAONE 4
}
_PROBE = "What was said before."


def render_with_history(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    history: str = "template",
    *,
    chat_template: str | None = None,
) -> list[Sample]:
    """
    Render the turns of a conversation under a history policy.

    Each turn's context holds of earlier turns what the template renders (`"template"`), all reasoning (`"keep"`), or
    none (`"strip"`). The template's own switch is used where it has one. Where it has none, `"keep"` takes TRL's
    training template for the model, or is refused, and `"strip"` removes the reasoning from the messages.
    """
    if history == "template":
        return render_conversation(conversation, tokenizer, chat_template)
    if history not in HISTORIES:
        raise RenderingError(f"history={history!r} is not one of {', '.join(map(repr, HISTORIES))}.")
    source = ChatTemplate.for_conversation(tokenizer, chat_template, conversation.tools, {}).source
    keep = history == "keep"
    switches = {name: value == keep for name, value in _KEEPING_SWITCHES.items() if name in source}
    conversation = replace(conversation, template_kwargs={**conversation.template_kwargs, **switches})
    if not keep:
        return _without_earlier_reasoning(conversation, tokenizer, source)
    source = _keeping_template(conversation, tokenizer, source)
    template = ChatTemplate.for_conversation(tokenizer, source, conversation.tools, conversation.template_kwargs)
    # Templates that read no key keep reasoning that stands in the content.
    messages = [as_read(m, template).trained if m.get("role") == "assistant" else m for m in conversation.messages]
    return render_conversation(replace(conversation, messages=messages), tokenizer, source)


def _keeping_template(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    if _keeps_reasoning(conversation, tokenizer, source):
        return source
    training = _training_template(tokenizer)
    if training is not None and _keeps_reasoning(conversation, tokenizer, training):
        return training
    raise RenderingError(
        "history='keep' needs a chat template that can render the reasoning of earlier turns. This one has no switch "
        "for it, and TRL has no training template for it that does. Use history='template', or pass a chat template "
        "that keeps reasoning."
    )


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    from trl.chat_template_utils import get_training_chat_template  # here, because it imports torch

    try:
        template: str | None = get_training_chat_template(tokenizer)
    except ValueError:  # TRL's way to say that it knows none for this tokenizer
        return None
    return template


def _keeps_reasoning(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, source: str) -> bool:
    template = ChatTemplate.for_conversation(tokenizer, source, conversation.tools, conversation.template_kwargs)
    answer = as_read({"role": "assistant", "reasoning_content": _PROBE, "content": "Yes."}, template).trained
    question = {"role": "user", "content": "Really?"}
    return _PROBE in template.render([question, answer, question], add_generation_prompt=True)


def _without_earlier_reasoning(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, source: str
) -> list[Sample]:
    tags = reasoning_tags(source)

    def bare(message: Message) -> Message:
        if message.get("role") != "assistant":
            return message
        return without_reasoning(message, ParsedMessage.from_message(message, tags))

    samples, now = [], datetime.now()  # one clock for all turns
    for k in conversation.turns:
        messages = [*map(bare, conversation.messages[:k]), conversation.messages[k]]
        turn = replace(conversation, messages=messages, first_trained=k)
        prefixes = Prefixes.from_conversation(turn, tokenizer, source, now)
        if has_prompt(prefixes, k):
            samples += render_conversation(turn, tokenizer, prefixes=prefixes)
    # None at all: let the renderer say what is missing.
    return samples or render_conversation(conversation, tokenizer, source)
