"""What an assistant message says, and the forms in which messages and templates hold its reasoning."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .rendering_messages import Message, text_of, tool_calls_of
from .rendering_validation import REASONING_KEYS as REASONING_KEYS


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """
    Marks around the reasoning in what a model writes.

    Args:
        opening (`str`):
            Text before the reasoning.
        closing (`str`):
            Text after it.
        separator (`str`):
            White space between the closing mark and the answer, in models that put reasoning on lines of its own.
        own_lines (`bool`, *optional*):
            Whether reasoning stands on lines of its own; `None` where that differs from model to model.
    """

    opening: str
    closing: str
    separator: str
    own_lines: bool | None = None


THINK = ReasoningTags("<think>", "</think>", "\n\n")
KNOWN_TAGS = (
    THINK,
    ReasoningTags("<thought>", "</thought>", "\n\n"),
    ReasoningTags("<seed:think>", "</seed:think>", ""),
    ReasoningTags("[THINK]", "[/THINK]", ""),
    ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>", ""),
    ReasoningTags("<|channel>thought", "<channel|>", "", own_lines=True),
)


@dataclass(frozen=True, slots=True)
class Spoken:
    """
    What an assistant message says, whatever the form in which it says it.

    Args:
        reasoning (`str`):
            Text of its reasoning, without white space around it.
        answer (`str`):
            Text of its answer, without inline reasoning.
        calls (`list[dict]`):
            The functions that it calls.
        inline (`bool`):
            Whether the reasoning stands between tags in the content.
        verbatim (`str`):
            Text of its reasoning as given under a key: what the template does with white space is its own affair.
    """

    reasoning: str
    answer: str
    calls: list[dict[str, Any]]
    inline: bool
    verbatim: str = ""

    @classmethod
    def of(cls, message: Message, tags: ReasoningTags | None = None) -> "Spoken":
        """Read an assistant message whose inline reasoning stands between `<think>` tags or the given ones."""
        content, calls = text_of(message.get("content")), tool_calls_of(message)
        for key in REASONING_KEYS:
            if isinstance(message.get(key), str) and message[key].strip():
                return cls(message[key].strip(), content, calls, inline=False, verbatim=message[key])
        for pair in (THINK, tags or THINK):
            opened = content.lstrip()
            if opened.startswith(pair.opening) and pair.closing in opened:
                reasoning, answer = opened[len(pair.opening) :].split(pair.closing, 1)
                return cls(reasoning.strip(), answer, calls, inline=bool(reasoning.strip()))
        return cls("", content, calls, inline=False)


def reasoning_tags(chat_template: str) -> ReasoningTags | None:
    """Return the marks that a template writes or looks for, `None` if it knows nothing of reasoning."""
    code = without_comments(chat_template)
    return next((tags for tags in KNOWN_TAGS if tags.opening in code or tags.closing in code), None)


@lru_cache
def without_comments(chat_template: str) -> str:
    """Return a template without its comments, which may speak of what it does not do."""
    return re.sub(r"\{#.*?#\}", "", chat_template, flags=re.DOTALL)


def without_reasoning(message: Message, said: Spoken) -> Message:
    """Return the message with nothing but its answer and its tool calls."""
    bare = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    return {**bare, "content": said.answer.lstrip("\n")} if said.inline else bare


def with_reasoning_key(message: Message, said: Spoken, keys: tuple[str, ...]) -> Message:
    """Return the message with its reasoning under each of `keys`."""
    return {**without_reasoning(message, said), **dict.fromkeys(keys, said.verbatim or said.reasoning)}


def with_reasoning_inline(message: Message, said: Spoken, tags: ReasoningTags) -> Message:
    """Return the message with its reasoning between tags at the start of its content."""
    content = f"{tags.opening}\n{said.reasoning}\n{tags.closing}{tags.separator}{said.answer}"
    return {**without_reasoning(message, said), "content": content}


def build_completion(prompt: str, bare: str, reasoning: str, tags: ReasoningTags, own_lines: bool) -> str | None:
    """
    Write the completion of a turn whose template leaves the reasoning out, in the form in which the model writes it.

    Args:
        prompt (`str`):
            Prompt as served. It may end with the opening tag.
        bare (`str`):
            Rendering of the turn without reasoning.
        reasoning (`str`):
            The reasoning.
        tags (`ReasoningTags`):
            Marks that the model writes around it.
        own_lines (`bool`):
            Whether the marks stand on lines of their own. What the prompt or `bare` shows comes first.

    Returns:
        `str` or `None`: The text after the prompt; `None` if the prompt has closed the reasoning, or `bare` does not
        continue it.
    """
    opened = re.search(rf"{re.escape(tags.opening)}(\s*)\Z", prompt)
    head = prompt[: opened.start()] if opened else prompt
    if prompt.rstrip().endswith(tags.closing) or not bare.startswith(head):
        return None
    body = bare[len(head) :]
    # Templates that keep an empty block, or just its end, show how the model spaces it.
    block = re.match(rf"(?:{re.escape(tags.opening)}(\s*))?{re.escape(tags.closing)}(\s*)", body)
    shown = opened[1] if opened else block[1] if block and block[1] is not None else "\n" * own_lines
    line = "\n" if "\n" in shown else ""
    separator = block[2] if block else tags.separator if line else ""
    rest = body[block.end() :] if block else body.lstrip("\n")
    start = "" if opened else tags.opening + line
    return f"{start}{reasoning}{line}{tags.closing}{separator}{rest}"
