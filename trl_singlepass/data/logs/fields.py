"""Read fields of a log's JSON; a field of the wrong type is a bad line that names it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from ...rendering.validation import describe_type
from .bad_lines import LogError


Kind = TypeVar("Kind", dict[str, Any], list[Any], str)
Value = TypeVar("Value")
_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "text"}


def get_object(parent: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """Return the object under a key; `None` if there is none. An object that is stored as JSON text is decoded."""
    value = parent.get(key)
    return _check(_decode(value, key) if isinstance(value, str) else value, key, dict)


def get_list(parent: Mapping[str, Any], key: str) -> list[Any] | None:
    """Return the list under a key; `None` if there is none."""
    return _check(parent.get(key), key, list)


def get_text(parent: Mapping[str, Any], key: str) -> str | None:
    """Return the text under a key; `None` if there is none."""
    return _check(parent.get(key), key, str)


def get_objects(parent: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the list of objects under a key; an empty list if there is none."""
    return [require(_check(item, key, dict), key) for item in get_list(parent, key) or []]


def require(value: Value | None, key: str) -> Value:
    """Return a value that must not be `None`."""
    if value is None:
        raise LogError(f"'{key}' is missing.")
    return value


def join_text(content: object, types: Collection[str], where: str) -> str | None:
    """
    Return the text of a message's content, `None` if there is no content.

    Parts of text are joined as chat templates print them, one after the other. Parts of `types` hold text under
    `text`; any other, such as an image, is a [`LogError`]. `where` names what the content belongs to.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise LogError(f"The content of {where} is {describe_type(content)}, expected text or a list of parts.")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else describe_type(part)
        if not isinstance(part, dict) or kind not in types or not isinstance(part.get("text"), str):
            raise LogError(f"The content of {where} has a part of type '{kind}': only text is trained.")
        texts.append(part["text"])
    return "".join(texts)


def _check(value: object, key: str, kind: type[Kind]) -> Kind | None:
    if value is not None and not isinstance(value, kind):
        raise LogError(f"'{key}' has {describe_type(value)} where {_KINDS[kind]} is expected.")
    return value


def _decode(text: str, key: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LogError(f"'{key}' is text that is not JSON, expected an object.") from error
