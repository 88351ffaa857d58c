"""Find request and response in a line of a proxy's or a server's log."""

from __future__ import annotations

from typing import Any

from .bad_lines import LogError
from .fields import get_object, get_text
from .requests import Json, LogLine
from .streams import is_stream, join_stream


_REQUEST_KEYS = ("request", "request_body", "body")
_RESPONSE_KEYS = ("response", "response_body")


def get_exchange(line: LogLine) -> tuple[Json, Json]:
    """
    Return what was sent and what came back: request and response.

    The request stands under `request`, `request_body` or `body` or on the line itself, the response under `response`,
    `response_body` or on the line itself. Either may be wrapped once more, in `body`, and may be JSON text; the
    response may be a stream, as a list of events or as their text.

    Raises [`LogError`] if there is no response, it is an error or a part of a stream, or a stream cannot be read.
    """
    request = _unwrap(line.entry, _REQUEST_KEYS)
    stream = _find_stream(line.entry)
    response = _unwrap(line.entry, _RESPONSE_KEYS) if stream is None else join_stream(stream)
    if "extra_body" in request:  # of OpenAI's Python client, which merges it into the request
        request = {**request, **(get_object(request, "extra_body") or {})}
    _check_response(response, line.entry)
    return request, response


def _find_stream(entry: Json) -> Any:
    for key in _RESPONSE_KEYS:
        value = entry.get(key)
        for found in (value, value.get("body") if isinstance(value, dict) else None):
            if is_stream(found):
                return found
    return None


def _unwrap(entry: Json, keys: tuple[str, ...]) -> Json:
    for key in keys:
        if entry.get(key) is not None:
            found = get_object(entry, key) or {}
            body = found.get("body")
            return (get_object(found, "body") or {}) if isinstance(body, dict | str) else found
    return entry


def _check_response(response: Json, entry: Json) -> None:
    if response is entry and any(key in entry for key in _RESPONSE_KEYS):
        raise LogError("There is no response: the request failed or was not answered.")
    error = response.get("error")
    if error:
        message = get_text(error, "message") if isinstance(error, dict) else str(error)
        raise LogError(f"The response is an error: '{message}'.")
    if str(response.get("object", "")).endswith(".chunk"):
        raise LogError("The response is one part of a stream. Log all of its parts, on one line.")
