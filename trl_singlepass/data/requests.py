"""Examples that hold all requests of a conversation, each with the context that it was sent: one tree for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..rendering.validation import RenderingError, describe_type
from .images import image_columns_of


# What an example may hold for those of its requests that have none of their own.
_COMMON = ("tools", "chat_template_kwargs", "system", "history")
_FORM = "an object with the messages of its context in 'prompt' and those that follow it in 'completion'"


def split_requests(example: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """
    Return the `requests` of an example, each as an example with `prompt` and `completion`; `None` if it has none.

    A request without `tools`, `chat_template_kwargs`, `system` or `history` has those of the example.
    """
    requests = example.get("requests")
    if requests is None:
        return None
    if not isinstance(requests, list) or not requests:
        what = "an empty list" if requests == [] else describe_type(requests)
        raise RenderingError(f"'requests' is {what}, expected a list of requests, each {_FORM}. Leave the row out.")
    if any(image_columns_of(example).values()):
        raise RenderingError("'requests' stand beside images. Store each as a row with 'prompt' and 'completion'.")
    common = {key: example[key] for key in _COMMON if example.get(key) is not None}
    for index, request in enumerate(requests):
        columns = request if isinstance(request, Mapping) else {}
        if not all(isinstance(columns.get(key), list) for key in ("prompt", "completion")):
            raise RenderingError(f"Request {index} is not {_FORM}. Repair it, or leave it out.")
    return [common | {key: value for key, value in request.items() if value is not None} for request in requests]
