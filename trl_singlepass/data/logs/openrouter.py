"""
Traces of OpenRouter's Broadcast, as it writes them to S3, and in spans of OpenTelemetry.

Source: https://openrouter.ai/docs/guides/features/broadcast
"""

from __future__ import annotations

from typing import Any

from . import openai_chat
from .lines import Json, LogLine, get, get_objects, need
from .requests import LoggedRequest


def is_trace(entry: Json) -> bool:
    """Return whether an object is a trace."""
    trace = _unwrap(entry)
    prompt, completion = trace.get("input"), trace.get("output")
    return isinstance(prompt, dict) and isinstance(completion, dict) and "completion" in completion


def read_trace(line: LogLine) -> list[LoggedRequest]:
    """Return the request of a trace."""
    trace = _unwrap(line.entry)
    observations = get_objects(trace, "observations") or [{}]
    reason = observations[0].get("normalizedFinishReason") or observations[0].get("finishReason")
    return read_completion(line, need(trace, "input", dict), need(trace, "output", dict), reason)


def _unwrap(entry: Json) -> Json:
    return get(entry, "trace", dict) or entry


def read_completion(line: LogLine, prompt: Json, completion: Json, finish_reason: Any) -> list[LoggedRequest]:
    """Return a request: what was sent besides its messages is in the completion."""
    calls = completion.get("toolCalls") or None
    message = {
        "content": completion.get("completion") or (None if calls else ""),
        "reasoning": completion.get("reasoning"),
        "tool_calls": calls,
    }
    request = {**(get(completion, "rawRequest", dict) or {}), **prompt}
    response = {"choices": [{"message": message, "finish_reason": finish_reason}]}
    return openai_chat.read_exchange(line, request, response)
