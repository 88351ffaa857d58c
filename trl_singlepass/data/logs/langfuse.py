"""
Exports of Langfuse: its generations, from the table of observations, a trace, the API or blob storage.

A generation does not tell whether its reply was cut.

Source: https://langfuse.com/docs/api-and-data-platform/features/blob-storage-export-fields and `export-from-ui`
"""

from __future__ import annotations

import json
from typing import Any

from . import anthropic, openai_chat
from .lines import Json, LogError, LoggedRequest, LogLine, function_tool, get, get_objects


_PARAMETERS = ("modelParameters", "model_parameters")


def is_observation(entry: Json) -> bool:
    """Return whether an object is an observation, or holds a list of them."""
    return any("input" in part and ("traceId" in part or "trace_id" in part) for part in find_observations(entry))


def find_observations(entry: Json) -> list[Json]:
    """Return the observations of a line: those of a trace, of a page of the API, or the line itself."""
    lists = (get_objects(entry, key) for key in ("observations", "data") if isinstance(entry.get(key), list))
    return next(lists, [entry])


def read_observation(line: LogLine) -> list[LoggedRequest]:
    """Return the request of a generation; of other observations, none."""
    entry = line.entry
    if entry.get("type") not in (None, "GENERATION"):
        return []
    if entry.get("level") == "ERROR":
        raise LogError(f"The response is an error: '{entry.get('statusMessage') or entry.get('status_message')}'.")
    sent = _decode(entry.get("input"))
    parameters = next((get(entry, key, dict) for key in _PARAMETERS if entry.get(key)), None)
    request = {
        "tools": _read_tools(entry),
        **(parameters or {}),
        **(sent if isinstance(sent, dict) else {"messages": sent}),
    }
    response = _read_output(entry.get("output"))
    if "stop_reason" in response:
        return anthropic.read_exchange(line, request, response)
    return openai_chat.read_exchange(line, request, response)


def _read_output(output: Any) -> Json:
    """Return the response: an output is one, or a message, or the text of a message."""
    decoded = _decode(output)
    if isinstance(decoded, list) and len(decoded) == 1:
        decoded = decoded[0]
    if isinstance(decoded, dict) and ("choices" in decoded or "stop_reason" in decoded):
        return decoded
    if isinstance(decoded, dict) and "role" in decoded:
        message = decoded
    elif isinstance(output, str) and output:
        message = {"content": output}
    else:
        raise LogError("The 'output' of the observation is neither a message nor text.")
    return {"choices": [{"message": message, "finish_reason": "stop"}]}


def _read_tools(entry: Json) -> list[Json] | None:
    """Return the tools that blob storage has by their names."""
    schemas = get(entry, "tool_definitions", dict) or {}
    tools = []
    for name in schemas:
        schema = get(schemas, name, dict) or {}
        tools.append(function_tool(name, schema.get("description"), schema.get("parameters")))
    return tools or None


def _decode(value: Any) -> Any:
    """Return the value of JSON text; other text is left as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (json.JSONDecodeError, RecursionError):
        return value
