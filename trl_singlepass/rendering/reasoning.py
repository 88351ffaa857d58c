"""What an assistant message says, and the forms in which messages and templates hold its reasoning."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .conversation import Message, get_function_calls, get_text
from .validation import REASONING_KEYS as REASONING_KEYS


# Types of content parts that hold reasoning: Mistral's and Anthropic's, and OpenAI's.
_REASONING_PARTS = ("thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """
    Tags around the reasoning in what a model writes.

    Args:
        opening (`str`):
            Text before the reasoning.
        closing (`str`):
            Text after it.
        separator (`str`):
            White space between the closing tag and the answer, in models that put reasoning on lines of its own.
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
class ParsedMessage:
    """
    What an assistant message says, in whatever form it says it.

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
            The reasoning exactly as its key or content part gives it; the template decides what to trim.
    """

    reasoning: str
    answer: str
    calls: list[dict[str, Any]]
    inline: bool = False
    verbatim: str = ""

    @classmethod
    def from_message(cls, message: Message, tags: ReasoningTags | None = None) -> "ParsedMessage":
        """Parse an assistant message whose inline reasoning stands between `<think>` tags or the given ones."""
        content, calls = get_text(message.get("content")), get_function_calls(message)
        for key in REASONING_KEYS:
            if isinstance(message.get(key), str) and message[key].strip():
                return cls(message[key].strip(), content, calls, verbatim=message[key])
        thoughts = _reasoning_in_parts(message.get("content"))
        if thoughts.strip():
            return cls(thoughts.strip(), content, calls, verbatim=thoughts)
        for pair in (THINK, tags or THINK):
            opened = content.lstrip()
            if opened.startswith(pair.opening) and pair.closing in opened:
                reasoning, answer = opened[len(pair.opening) :].split(pair.closing, 1)
                return cls(reasoning.strip(), answer, calls, inline=bool(reasoning.strip()))
        return cls("", content, calls)


def _reasoning_in_parts(content: object) -> str:
    parts = content if isinstance(content, list) else []
    return "".join(_get_reasoning_text(part) for part in parts if isinstance(part, Mapping))


def _get_reasoning_text(part: Mapping[str, Any]) -> str:
    if part.get("type") not in _REASONING_PARTS:
        return ""
    text = part.get(part["type"]) or part.get("text")
    return text if isinstance(text, str) else get_text(text)


def reasoning_tags(chat_template: str) -> ReasoningTags | None:
    """Return the tags that a template writes or looks for, `None` if it knows nothing of reasoning."""
    code = without_comments(chat_template)
    return next((tags for tags in KNOWN_TAGS if tags.opening in code or tags.closing in code), None)


@lru_cache
def without_comments(chat_template: str) -> str:
    """Return a template without its comments, which may mention what it does not do."""
    return re.sub(r"\{#.*?#\}", "", chat_template, flags=re.DOTALL)


def without_reasoning(message: Message, parsed: ParsedMessage) -> Message:
    """Return the message with nothing but its answer and its tool calls."""
    bare = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    if isinstance(bare.get("content"), list):
        bare["content"] = [part for part in bare["content"] if not is_reasoning_part(part)]
    return {**bare, "content": parsed.answer.lstrip("\n")} if parsed.inline else bare


def is_reasoning_part(part: object) -> bool:
    """Whether a content part holds reasoning."""
    return isinstance(part, Mapping) and part.get("type") in _REASONING_PARTS


def with_reasoning_key(message: Message, parsed: ParsedMessage, keys: tuple[str, ...]) -> Message:
    """Return the message with its reasoning under each of `keys`."""
    return {**without_reasoning(message, parsed), **dict.fromkeys(keys, parsed.verbatim or parsed.reasoning)}


def with_reasoning_inline(message: Message, parsed: ParsedMessage, tags: ReasoningTags) -> Message:
    """Return the message with its reasoning between tags at the start of its content."""
    content = f"{tags.opening}\n{parsed.reasoning}\n{tags.closing}{tags.separator}{parsed.answer}"
    return {**without_reasoning(message, parsed), "content": content}


def write_reasoning(prompt: str, bare: str, reasoning: str, tags: ReasoningTags, own_lines: bool) -> tuple[str, int]:
    """
    Put the reasoning of a turn into a completion from which the template leaves it out, as the model writes it.

    Args:
        prompt (`str`):
            Prompt as served. It may end with the opening tag.
        bare (`str`):
            What the template writes after the prompt for the message without reasoning. It may begin with an empty
            block, or with the end of one.
        reasoning (`str`):
            The reasoning.
        tags (`ReasoningTags`):
            Tags that the model writes around it.
        own_lines (`bool`):
            Whether the tags stand on lines of their own. What the prompt or `bare` shows takes precedence.

    Returns:
        `tuple[str, int]`: The completion, and the position in it at which the reasoning begins.
    """
    opened = re.search(rf"{re.escape(tags.opening)}(\s*)\Z", prompt)
    # Templates that keep an empty block, or just its end, show how the model spaces it.
    block = re.match(rf"(\s*)(?:{re.escape(tags.opening)}(\s*))?{re.escape(tags.closing)}(\s*)", bare)
    inside = block[2] if block else None
    shown = opened[1] if opened else inside if inside is not None else "\n" * own_lines
    line = "\n" if "\n" in shown else ""
    separator = block[3] if block else tags.separator if line else ""
    rest = bare[block.end() :] if block else bare.lstrip("\n")
    start = "" if opened else (block[1] if block else "") + tags.opening + line
    return f"{start}{reasoning}{line}{tags.closing}{separator}{rest}", len(start)
