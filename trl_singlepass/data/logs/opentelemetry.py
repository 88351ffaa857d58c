"""
Spans and events of OpenTelemetry's GenAI conventions (OTLP as JSON, and lines that have attributes), and the traces
that OpenRouter's Broadcast sends in such spans, or writes to S3.

Sources: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/ (`gen_ai.input.messages`,
`gen_ai.output.messages`, `gen_ai.system_instructions`, `gen_ai.tool.definitions`) and, for the JSON around them,
https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding; https://openrouter.ai/docs/guides/features/broadcast
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ...rendering.conversation import Message
from . import anthropic, openai_chat
from .lines import (
    Json,
    LogError,
    LoggedRequest,
    LogLine,
    decode,
    function_tool,
    get,
    get_objects,
    join_text,
    need,
)


# Operations that are one request to a model; the messages of others (`invoke_agent`, …) are those of several.
_REQUESTS = (None, "chat", "generate_content", "text_completion")
_ENDED = ("stop", "tool_call", "tool_calls", "end_turn", "tool_use")
_SIGNALS = (("resourceSpans", "scopeSpans", "spans"), ("resourceLogs", "scopeLogs", "logRecords"))


def find_records(entry: Json) -> list[Json]:
    """Return the attributes of each span and each event of a line that are about a model."""
    records = [record for signal in _SIGNALS for record in _find(entry, signal)]
    records += [event for record in records for event in get_objects(record, "events")]
    if "attributes" in entry:
        records.append(entry)
    found = [_read_attributes(record.get("attributes")) for record in records]
    return [attributes for attributes in [*found, entry] if any(key.startswith("gen_ai.") for key in attributes)]


def _find(parent: Json, keys: tuple[str, ...]) -> Iterator[Json]:
    """Yield the objects of lists in lists."""
    for child in get_objects(parent, keys[0]):
        yield from _find(child, keys[1:]) if keys[1:] else [child]


def _read_attributes(attributes: Any) -> Json:
    """Return attributes as an object; OTLP has a list of keys and values."""
    if isinstance(attributes, list):
        return {str(pair.get("key")): _read_value(pair.get("value")) for pair in attributes if isinstance(pair, dict)}
    return attributes if isinstance(attributes, dict) else {}


def _read_value(value: Any) -> Any:
    """Return what a value of OTLP stands for."""
    match value:
        case {"arrayValue": dict(array)}:
            return list(map(_read_value, get_objects(array, "values")))
        case {"kvlistValue": dict(pairs)}:
            return _read_attributes(pairs.get("values"))
        case {"intValue": str(number)} if number.lstrip("-").isdecimal():  # JSON has no whole numbers of 64 bits
            return int(number)
        case dict():
            return next(iter(value.values()), None)
    return value


def read_record(line: LogLine) -> list[LoggedRequest]:
    """Return each reply of a request with the messages that were sent; of other operations, none."""
    attributes = line.entry
    if attributes.get("gen_ai.operation.name") not in _REQUESTS:
        return []
    if "gen_ai.completion" in attributes:  # of OpenRouter
        prompt, completion = (need(attributes, f"gen_ai.{key}", dict) for key in ("prompt", "completion"))
        reason = attributes.get("gen_ai.response.finish_reason")
        return _read_completion(line, prompt, completion, reason)
    context: list[Message] = []
    instructions = join_text(list(map(_to_block, _read_list(attributes, "system_instructions"))), "the system prompt")
    if instructions:
        context.append({"role": "system", "content": instructions})
    for message in _read_list(attributes, "input.messages"):
        context += _read_message(message)
    tools = [_read_tool(tool) for tool in _read_list(attributes, "tool.definitions")] or None
    replies, reasons = _read_list(attributes, "output.messages"), attributes.get("gen_ai.response.finish_reasons")
    if not replies:
        raise LogError("'gen_ai.output.messages' is missing: what is said is only recorded where that is switched on.")
    requests = []
    for number, reply in enumerate(replies):
        known = isinstance(reasons, list) and number < len(reasons) and reasons[number]
        reason = reply.get("finish_reason") or known or None
        if reason not in _ENDED:
            raise LogError(f"The reply did not end: its finish_reason is '{reason}', expected 'stop' or 'tool_call'.")
        (message,) = _read_message({**reply, "role": "assistant"})
        requests.append(LoggedRequest(line.place, context, message, tools, conversation=line.get_conversation({})))
    return requests


def _read_list(attributes: Json, name: str) -> list[Json]:
    """Return the objects of an attribute, which may be a list or its JSON text."""
    key = f"gen_ai.{name}"
    return get_objects({key: decode(attributes.get(key), key, "a list")}, key)


def _read_message(message: Json) -> list[Message]:
    if "parts" not in message:  # of instrumentations that record messages of Chat Completions
        return [openai_chat.read_message(message)]
    blocks = list(map(_to_block, get_objects(message, "parts")))
    return anthropic.read_message({"role": message.get("role"), "content": blocks})


def _to_block(part: Json) -> Json:
    """Return a part of a message as the Messages API has it."""
    match part.get("type"):
        case "text":
            return {"type": "text", "text": part.get("content")}
        case "reasoning":
            return {"type": "thinking", "thinking": part.get("content")}
        case "tool_call":
            return {"type": "tool_use", "id": part.get("id"), "name": part.get("name"), "input": part.get("arguments")}
        case "tool_call_response":
            result = part.get("response", part.get("result"))  # `result` before version 1.38
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
            return {"type": "tool_result", "tool_use_id": part.get("id"), "content": text}
    return part


def _read_tool(tool: Json) -> Json:
    function = get(tool, "function", dict) or tool
    if tool.get("type") != "function":
        raise LogError(f"A tool has the type '{tool.get('type')}', and its schema is not in the log.")
    return function_tool(function.get("name"), function.get("description"), get(function, "parameters", dict))


# OpenRouter's Broadcast ----------------------------------------------------------------------------------------------


def is_trace(entry: Json) -> bool:
    """Return whether an object is a trace."""
    trace = _unwrap_trace(entry)
    prompt, completion = trace.get("input"), trace.get("output")
    return isinstance(prompt, dict) and isinstance(completion, dict) and "completion" in completion


def read_trace(line: LogLine) -> list[LoggedRequest]:
    """Return the request of a trace."""
    trace = _unwrap_trace(line.entry)
    observations = get_objects(trace, "observations") or [{}]
    reason = observations[0].get("normalizedFinishReason") or observations[0].get("finishReason")
    return _read_completion(line, need(trace, "input", dict), need(trace, "output", dict), reason)


def _unwrap_trace(entry: Json) -> Json:
    return get(entry, "trace", dict) or entry


def _read_completion(line: LogLine, prompt: Json, completion: Json, finish_reason: Any) -> list[LoggedRequest]:
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
