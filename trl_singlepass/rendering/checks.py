"""What a turn says and its completion lacks, and what its completion holds that the turn does not say."""

import json
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .conversation import Message, text_of
from .markers import own_strings
from .prefixes import Prefixes
from .reasoning import REASONING_KEYS, ParsedMessage, is_reasoning_part, reasoning_tags, without_comments


# Parts of a key's name that make reasoning of what it holds.
_REASONING_WORDS = ("reason", "think", "thought", "cot", "rationale", "analysis", "scratchpad")


def missing_content(message: Message, parsed: ParsedMessage, completion: str, chat_template: str) -> str | None:
    """
    Return what an assistant message says and its completion lacks, as an error message; `None` if nothing is missing.

    Args:
        message (`dict`):
            The message.
        parsed ([`ParsedMessage`]):
            What it says.
        completion (`str`):
            Text that the model would generate, without the reasoning.
        chat_template (`str`):
            Source of the template.
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
    several = "Give each call a message of its own, if the template renders one per message, or use"
    way_out = several if len(parsed.calls) > 1 else "Use"
    return f"{lost}. {way_out} a template that renders tool calls" if lost else None


def missing_reasoning(chat_template: str) -> str:
    """Return the error message for reasoning that a template does not render."""
    return f"its reasoning is lost: {_reads(chat_template)}. {_way_out(chat_template)}"


def foreign_words(prefixes: Prefixes, k: int, completion: str) -> list[str]:
    """
    Return words in the completion of message `k` that only other messages say.

    A last line of defence: whatever a template does, its prompts are not trained. Words that the template or the tools
    write themselves do not count, and neither do words of one or two characters.
    """
    template, own = prefixes.template, prefixes.messages[k]
    unexplained = _words(completion) - _words(template.source) - _words(" ".join(_spellings(own)))
    if unexplained:
        unexplained -= _words(
            " ".join([*template.tokenizer.get_added_vocab(), *_spellings({"tools": template.tools})])
        )
    if not unexplained:
        return []
    said = ({key: value for key, value in message.items() if key != "role"} for message in prefixes.messages[:k])
    others = (text for message in said for text in _spellings(message))
    return sorted(word for word in unexplained & _words(" ".join(others)) if len(word) > 2)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text))


def _spellings(value: Any) -> list[str]:
    """Everything that a message says, also as JSON and as Python write it: templates print all of these."""
    strings = own_strings(value)
    decoded = [item for item in map(_decoded, strings) if isinstance(item, dict | list)]
    strings += [text for item in decoded for text in own_strings({"": item})]
    return [*strings, json.dumps(value, default=str), json.dumps(value, default=str, ensure_ascii=False), str(value)]


def template_name(tokenizer: Any, chat_template: str) -> str:
    """Return how to call a template in a message to the user."""
    name = _name_in_trl(chat_template) or tokenizer.name_or_path
    return f"chat template '{name}'" if name else "chat template"


@lru_cache
def _name_in_trl(chat_template: str) -> str | None:
    spec = find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else Path()
    paths = sorted(folder.glob("*.jinja"))
    return next((path.stem for path in paths if path.read_text("utf-8") == chat_template), None)


def contains(text: str, part: str) -> bool:
    """Whether a text contains another one, but for white space around it."""
    return part.strip() in text


def without(text: str, part: str) -> str:
    """Return a text with the first occurrence of another one taken out."""
    return text.replace(part.strip(), " ", 1) if part.strip() in text else text


def _answers(message: Message, parsed: ParsedMessage) -> list[str]:
    content = message.get("content")
    return [text_of([block]) for block in content] if isinstance(content, list) else [parsed.answer]


def stray_reasoning(message: Message) -> list[str]:
    """Return the keys of a message that hold reasoning by their name, but that no template reads."""
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
        return "Write it into 'content' as <think>…</think>, remove it, or use the template of a reasoning model"
    return (
        "Its prompt leaves no place for it: switch thinking on through 'chat_template_kwargs', or use a template that "
        "renders it"
    )


def lost_calls(parsed: ParsedMessage, rest: str) -> str | None:
    """Return which tool call, or argument of one, a completion without its reasoning does not hold, if any."""
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


def is_object(content: Any) -> bool:
    """Whether a message's content is what a tool returned as an object, or a list of objects, and no text."""
    parts = content if isinstance(content, list) else [content]
    objects = [part for part in parts if isinstance(part, dict) and not is_reasoning_part(part)]
    return any(not isinstance(part.get("text"), str) for part in objects)


def prints(text: str, value: Any) -> bool:
    """Whether a text holds all keys and values of an object."""
    return all(_prints(text, leaf) for leaf in _leaves(value))


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, str):
        decoded = _decoded(value)
        return _leaves(decoded) if isinstance(decoded, dict | list) else [value]
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (str(key), *_plain_leaves(item))]
    return _plain_leaves(value)


def _plain_leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (str(key), *_plain_leaves(item))]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _plain_leaves(item)]
    return [] if value is None else [value]


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _prints(text: str, leaf: Any) -> bool:
    """Whether a text holds a value in one of the ways in which templates print it."""
    if not isinstance(leaf, str):
        return str(leaf) in text or json.dumps(leaf) in text
    if contains(text, leaf):
        return True
    quoted = (json.dumps(leaf), json.dumps(leaf, ensure_ascii=False), repr(leaf))
    return any(contains(text, form[1:-1]) for form in quoted)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}…{text[-1]}"
