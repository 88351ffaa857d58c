"""What an assistant message says, and the forms in which messages and templates hold its reasoning."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .conversation import Message, get_function_calls, get_text
from .validation import REASONING_KEYS as REASONING_KEYS
from .validation import decode_json


# Types of content parts that hold reasoning: Mistral's and Anthropic's, and OpenAI's.
_REASONING_PARTS = ("thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """
    Tags around the reasoning in what a model writes.

    `separator` is the white space between the closing tag and the answer. `own_lines` says whether reasoning stands on
    lines of its own; `None` where that differs from model to model.
    """

    opening: str
    closing: str
    separator: str
    own_lines: bool | None = None

    def around(self, reasoning: str) -> str:
        """Return the reasoning between its tags, followed by the separator."""
        line = "" if self.own_lines is False else "\n"
        return f"{self.opening}{line}{reasoning}{line}{self.closing}{self.separator}"


THINK = ReasoningTags("<think>", "</think>", "\n\n")
KNOWN_TAGS = (
    THINK,
    ReasoningTags("<thought>", "</thought>", "\n\n", own_lines=True),
    ReasoningTags("<seed:think>", "</seed:think>", "", own_lines=False),
    ReasoningTags("[THINK]", "[/THINK]", "", own_lines=False),
    ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>", "", own_lines=False),
    ReasoningTags("<|channel>thought", "<channel|>", "", own_lines=True),
)


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """
    What an assistant message says, in whatever form it says it.

    `reasoning` is its reasoning without white space around it, `verbatim` exactly as its key or content part gives it;
    `answer` is the text of its content without inline reasoning. `inline` holds the tags between which the content has
    a block of reasoning; `given_twice` says that the content has reasoning besides that under a key.
    """

    reasoning: str
    answer: str
    calls: list[dict[str, Any]]
    inline: ReasoningTags | None = None
    verbatim: str = ""
    given_twice: bool = False

    @classmethod
    def from_message(cls, message: Message, tags: ReasoningTags | None = None) -> "ParsedMessage":
        """Parse an assistant message whose inline reasoning stands between `<think>` tags or the given ones."""
        content, calls = get_text(message.get("content")), get_function_calls(message)
        under_keys = (message.get(key) for key in REASONING_KEYS)
        verbatim = next((text for text in under_keys if isinstance(text, str) and text.strip()), None)
        verbatim = verbatim or _reasoning_in_parts(message.get("content"))
        used = next((pair for pair in (THINK, tags or THINK) if _begins_with_block(content, pair)), None)
        if used is None:
            return cls(verbatim.strip(), content, calls, verbatim=verbatim)
        reasoning, answer = content.lstrip()[len(used.opening) :].split(used.closing, 1)
        if not verbatim.strip():
            return cls(reasoning.strip(), answer, calls, inline=used if reasoning.strip() else None)
        if reasoning.strip():
            return cls(verbatim.strip(), content, calls, verbatim=verbatim, given_twice=True)
        return cls(verbatim.strip(), answer, calls, inline=used, verbatim=verbatim)  # an empty block says nothing

    @property
    def is_inline(self) -> bool:
        """Whether the content alone holds the reasoning."""
        return self.inline is not None and not self.verbatim.strip()


def decode_arguments(arguments: object) -> dict[str, Any] | None:
    """Return the arguments of a call as an object, `None` if they are none."""
    if isinstance(arguments, str):
        arguments = decode_json(arguments) if arguments.strip() else {}
    return arguments if isinstance(arguments, dict) else None


def _begins_with_block(content: str, tags: ReasoningTags) -> bool:
    return content.lstrip().startswith(tags.opening) and tags.closing in content


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
    if parsed.inline:
        return {**bare, "content": parsed.answer.lstrip("\n")}
    if isinstance(bare.get("content"), list):
        bare["content"] = [part for part in bare["content"] if not is_reasoning_part(part)] or ""
    return bare


def is_reasoning_part(part: object) -> bool:
    """Whether a content part holds reasoning."""
    return isinstance(part, Mapping) and part.get("type") in _REASONING_PARTS


def with_reasoning_keys(message: Message, parsed: ParsedMessage, keys: tuple[str, ...]) -> Message:
    """Return the message with its reasoning under each of `keys`."""
    return {**without_reasoning(message, parsed), **dict.fromkeys(keys, parsed.verbatim or parsed.reasoning)}


def with_reasoning_part(message: Message, parsed: ParsedMessage) -> Message:
    """Return the message with its reasoning in a content part of its own."""
    bare = without_reasoning(message, parsed)
    answer = bare.get("content") or []
    answer = [{"type": "text", "text": answer}] if isinstance(answer, str) else answer
    return {**bare, "content": [{"type": "thinking", "thinking": parsed.verbatim or parsed.reasoning}, *answer]}


def with_reasoning_inline(message: Message, parsed: ParsedMessage, tags: ReasoningTags) -> Message:
    """Return the message with its reasoning between tags at the start of its content."""
    bare = without_reasoning(message, parsed)
    return {**bare, "content": tags.around(parsed.reasoning) + get_text(bare.get("content"))}


def write_reasoning(prompt: str, bare: str, reasoning: str, tags: ReasoningTags, own_lines: bool) -> tuple[str, int]:
    """
    Put the reasoning of a turn into a completion from which the template leaves it out, as the model writes it.

    The prompt may end with the opening tag. `bare` is what the template writes after it for the message without
    reasoning, perhaps an empty block, or the end of one. The white space that either shows takes precedence over
    `own_lines`. Returns the completion, and where in it the reasoning begins.
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
