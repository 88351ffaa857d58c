"""What a completion lacks of its message, and what it holds that the message does not say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .conversation import Message, get_text
from .prefixes import Prefixes
from .reasoning import (
    REASONING_KEYS,
    ParsedMessage,
    decode_arguments,
    is_reasoning_part,
    reasoning_tags,
    without_comments,
)
from .validation import decode_json


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Parts of a key's name that make reasoning of what it holds.
_REASONING_WORDS = ("reason", "think", "thought", "cot", "rationale", "analysis", "scratchpad")


def find_fault(parsed: ParsedMessage) -> str | None:
    """Return why no model should learn to write a message, `None` if nothing speaks against it."""
    if parsed.given_twice:
        return "it has reasoning twice, under a key and between tags in its 'content'. Keep one of the two"
    for call in parsed.calls:
        arguments = call.get("arguments")
        if isinstance(arguments, str) and decode_arguments(arguments) is None:
            where = f"the 'arguments' of its call of '{call.get('name')}'"
            return f"{where} are not JSON of an object. Repair them, or leave the row out"
    return None


def missing_content(
    message: Message, parsed: ParsedMessage, completion: str, chat_template: str, with_call_ids: Callable[[], str]
) -> str | None:
    """
    Return what an assistant message says but its completion, given without the reasoning, lacks; `None` if nothing.

    `with_call_ids` renders the message with ids that name its tools.
    """
    stray = [key for key in stray_reasoning(message) if not contains(completion, message[key])]
    if stray:
        return f"its reasoning is lost: {_reads(chat_template)}, the message has '{stray[0]}'. Rename the key"
    if "function_call" in message and not parsed.calls:
        return "its 'function_call' is lost: templates read 'tool_calls'. Rewrite it as a list of one tool call"
    if not all(contains(completion, text) for text in _answers(message, parsed)):
        return (
            f"its answer {_short(parsed.answer)} is lost or changed. Does the template take text beside tool calls, "
            "content as a string, or a literal closing tag such as </think> in an answer?"
        )
    lost = lost_calls(parsed, completion)
    return f"{lost}. {_how_to_render_calls(message, with_call_ids())}" if lost else None


def _how_to_render_calls(message: Message, with_ids: str) -> str:
    names = [str(call["function"].get("name")) for call in message["tool_calls"]]
    if all(f"functions.{name}:{index}" in with_ids for index, name in enumerate(names)):  # Kimi K2 names tools in ids
        given = message["tool_calls"][0].get("id")
        shown = f"the id {given!r} in its place: put the name into it" if given else "its 'id' alone: give it one"
        return f"The template writes {shown}, as in 'functions.{names[0]}:0'"
    several = "Give each call a message of its own, if the template renders one per message, or use"
    return f"{several if len(names) > 1 else 'Use'} a template that renders tool calls"


def missing_reasoning(chat_template: str) -> str:
    """Return the error message for reasoning that a template does not render."""
    return f"its reasoning is lost: {_reads(chat_template)}. {_way_out(chat_template)}"


def foreign_words(prefixes: Prefixes, k: int, completion: str) -> list[str]:
    """
    Return the words in the completion of message `k` that only other messages contain.

    A last line of defence: whatever a template does, its prompts are not trained. Words that the template or the tools
    write themselves do not count, and neither do words of one or two characters.
    """
    template, own = prefixes.template, prefixes.trained.get(k, prefixes.messages[k])
    # What explains most words for the least work comes first.
    words = words_in(without_whole(completion, own_strings(own))) - _words_of_template(template.markup)
    unexplained = {word for word in words if len(word) > 2}
    if unexplained:
        unexplained -= words_in(" ".join(_spellings(own)))
    if unexplained:
        unexplained -= words_in(" ".join(_spellings({"tools": template.tools})))
    if not unexplained:
        return []
    said = ({key: value for key, value in message.items() if key != "role"} for message in prefixes.messages[:k])
    return sorted(unexplained & words_in(" ".join(text for message in said for text in _spellings(message))))


def made_numbers(completion: str, message: Message, tokens: Iterable[str]) -> set[str]:
    """Return the numbers in a completion that stand neither in its message nor in tokens of the template."""
    said = words_in(" ".join([*_spellings(message), *tokens]))
    return {word for word in words_in(without_whole(completion, own_strings(message))) - said if word.isdigit()}


@lru_cache
def _words_of_template(markup: str) -> frozenset[str]:
    return frozenset(words_in(markup))


def words_in(text: str) -> set[str]:
    """Return the words of a text: its longest runs of letters and digits."""
    return set(re.findall(r"[^\W_]+", text))


def without_whole(text: str, parts: list[str]) -> str:
    """Return a text without those of some parts that begin and end with its words: all other words stay in it."""
    for part in map(str.strip, parts):
        start = text.find(part)
        end = start + len(part)
        if start >= 0 and not _is_inside_word(text, start) and not _is_inside_word(text, end):
            text = f"{text[:start]} {text[end:]}"
    return text


def _is_inside_word(text: str, position: int) -> bool:
    return 0 < position < len(text) and text[position - 1].isalnum() and text[position].isalnum()


def _spellings(value: Message) -> list[str]:
    """Everything a message says, as text, as JSON and as Python prints it: templates use all three."""
    strings = own_strings(value)
    decoded = [item for item in map(decode_json, strings) if isinstance(item, dict | list)]
    strings += [text for item in decoded for text in own_strings({"": item})]
    return [*strings, json.dumps(value, default=str), json.dumps(value, default=str, ensure_ascii=False), str(value)]


def template_name(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> str:
    """
    Return the name of a template for messages to the user: that of the same template in TRL, else the tokenizer's on
    the Hub with a hash of the template.
    """
    name = _name_in_trl(chat_template)
    if name is None:
        code = sha256(chat_template.encode()).hexdigest()[:8]
        source = str(tokenizer.name_or_path or "")
        name = code if not source or Path(source).is_dir() or Path(source).is_absolute() else f"{source} ({code})"
    return f"chat template '{name}'"


@lru_cache
def _name_in_trl(chat_template: str) -> str | None:
    spec = find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else Path()
    paths = sorted(folder.glob("*.jinja"))
    return next((path.stem for path in paths if path.read_text("utf-8") == chat_template), None)


def own_strings(message: Message) -> list[str]:
    """Return every string in a message: content, reasoning, names and arguments of calls, at any depth."""
    return [str(leaf) for value in message.values() for leaf in _plain_leaves(value)]


def contains(text: str, part: str) -> bool:
    """Whether a text contains another, ignoring white space around it."""
    return part.strip() in text


def without(text: str, part: str) -> str:
    """Return a text without the first occurrence of another."""
    return text.replace(part.strip(), " ", 1) if part.strip() in text else text


def _answers(message: Message, parsed: ParsedMessage) -> list[str]:
    content = message.get("content")
    return [get_text([block]) for block in content] if isinstance(content, list) else [parsed.answer]


def stray_reasoning(message: Message) -> list[str]:
    """Return the keys of a message whose names suggest reasoning, but which no template reads."""
    return [
        key
        for key, value in message.items()
        if key not in REASONING_KEYS
        and isinstance(value, str)
        and value.strip()
        and any(word in key.lower() for word in _REASONING_WORDS)
    ]


def _reads(chat_template: str) -> str:
    code = without_comments(chat_template)
    keys = [f"'{key}'" for key in REASONING_KEYS if re.search(rf"""\.{key}\b|['"]{key}['"]""", code)]
    if keys:
        return f"the template reads {' and '.join(keys)}"
    tags = reasoning_tags(chat_template)
    return f"the template knows {tags.opening}…{tags.closing}" if tags else "the template has no place for it"


def _way_out(chat_template: str) -> str:
    if reasoning_tags(chat_template) is None:
        return "Write it into 'content' as the model itself writes it, remove it, or use a template that renders it"
    return (
        "Its prompt leaves no place for it: switch thinking on through 'chat_template_kwargs', or use a template that "
        "renders it"
    )


def lost_calls(parsed: ParsedMessage, rest: str) -> str | None:
    """Return the tool call, or argument of one, that is missing from a completion without its reasoning, if any."""
    # Looked for outside the answer, which may speak of the tool. A short answer may also be a part of an argument, and
    # stand after the calls.
    reversed_answer = parsed.answer.strip()[::-1]
    outside = [without(rest, parsed.answer), rest[::-1].replace(reversed_answer, " ", 1)[::-1]]
    for call in parsed.calls:
        name, arguments = str(call.get("name")), call.get("arguments")
        if not any(name in text for text in outside):
            return f"its call of the tool '{name}' is lost"
        lost = [leaf for leaf in _leaves(arguments) if not any(_prints(text, leaf) for text in outside)]
        if lost:
            return f"the argument {_short(lost[0])} of its call of '{name}' is lost or changed"
    return None


def is_object(content: object) -> bool:
    """Whether a message's content is an object that a tool returned, or a list of objects, rather than text."""
    parts = content if isinstance(content, list) else [content]
    objects = [part for part in parts if isinstance(part, dict) and not is_reasoning_part(part)]
    return any(not isinstance(part.get("text"), str) for part in objects)


def prints(text: str, value: object) -> bool:
    """Whether a text holds all keys and values of an object."""
    return all(_prints(text, leaf) for leaf in _leaves(value))


def _leaves(value: object) -> list[Any]:
    decoded = decode_json(value) if isinstance(value, str) else value
    return _plain_leaves(decoded if isinstance(decoded, dict | list) else value)


def _plain_leaves(value: object) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (str(key), *_plain_leaves(item))]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _plain_leaves(item)]
    return [] if value is None else [value]


def _prints(text: str, leaf: object) -> bool:
    """Whether a text holds a value in one of the ways in which templates print it."""
    if not isinstance(leaf, str):
        return str(leaf) in text or json.dumps(leaf) in text
    if contains(text, leaf):
        return True
    quoted = (json.dumps(leaf), json.dumps(leaf, ensure_ascii=False), repr(leaf))
    return any(contains(text, form[1:-1]) for form in quoted)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}…{text[-1]}"
