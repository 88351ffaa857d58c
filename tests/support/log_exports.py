"""
A request to the Chat Completions API and its response, as proxies and observability tools export them.

The forms are those of https://docs.litellm.ai/docs/proxy/logging_spec,
https://langfuse.com/docs/api-and-data-platform/features/blob-storage-export-fields and `export-from-ui`,
https://openrouter.ai/docs/guides/features/broadcast and https://opentelemetry.io/docs/specs/semconv/gen-ai/.
"""

import json


def litellm(request, response):
    """A standard logging payload, with the tools among the parameters."""
    parameters = {key: value for key, value in request.items() if key not in ("model", "messages")}
    return {
        "id": "chatcmpl-1",
        "trace_id": "t",
        "call_type": "acompletion",
        "status": "success",
        "model": request["model"],
        "messages": request["messages"],
        "response": response,
        "error_str": None,
        "model_parameters": {"temperature": 1.0, **parameters},
    }


def langfuse(request, response):
    """A generation of the table of observations, where values are JSON."""
    (choice,) = response["choices"]
    return {
        "id": "o",
        "traceId": "t",
        "type": "GENERATION",
        "level": "DEFAULT",
        "modelParameters": {"temperature": 1},
        "input": {"messages": request["messages"], "tools": request["tools"]},
        "output": choice["message"],
    }


def langfuse_blob(request, response):
    """A generation in blob storage, where values are JSON text and tools stand by their names."""
    (choice,) = response["choices"]
    tools = {tool["function"]["name"]: json.dumps(tool["function"]) for tool in request["tools"]}
    return {
        "id": "o",
        "trace_id": "t",
        "type": "GENERATION",
        "model_parameters": "",
        "input": json.dumps(request["messages"]),
        "output": json.dumps(choice["message"]),
        "tool_definitions": tools,
    }


def openrouter(request, response):
    """A trace of Broadcast, as in S3."""
    prompt, completion, reason = _to_broadcast(request, response)
    observation = {"type": "GENERATION", "finishReason": reason, "normalizedFinishReason": reason}
    return {"trace": {"id": "t", "input": prompt, "output": completion, "observations": [observation]}}


def openrouter_span(request, response):
    """A trace of Broadcast, as OTLP."""
    prompt, completion, reason = _to_broadcast(request, response)
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.prompt": json.dumps(prompt),
        "gen_ai.completion": json.dumps(completion),
        "gen_ai.response.finish_reason": reason,
    }
    provider = {"name": "provider attempt 1", "attributes": [{"key": "http.status", "value": {"intValue": "200"}}]}
    return to_otlp([{"name": "LLM Generation", "attributes": to_pairs(attributes)}, provider])


def _to_broadcast(request, response):
    (choice,) = response["choices"]
    message = choice["message"]
    completion = {
        "completion": message.get("content") or "",
        "reasoning": message.get("reasoning_content"),
        "toolCalls": message.get("tool_calls") or [],
        "rawRequest": {"model": request["model"], "tools": request["tools"]},
    }
    return {"messages": request["messages"]}, completion, choice["finish_reason"]


def opentelemetry(request, response):
    """A span with structured attributes, beside that of the agent that made the request."""
    agent = {"name": "invoke_agent", "attributes": to_pairs({"gen_ai.operation.name": "invoke_agent"})}
    span = {"name": "chat m", "attributes": to_pairs(to_attributes(request, response))}
    return to_otlp([agent, span])


def opentelemetry_event(request, response):
    """An event with attributes that are JSON text, as an exporter of lines writes it."""
    attributes = {
        key: json.dumps(value) if isinstance(value, list) else value
        for key, value in to_attributes(request, response).items()
    }
    return {"event_name": "gen_ai.client.inference.operation.details", "attributes": attributes}


def to_attributes(request, response):
    """A request and its response as attributes of the GenAI conventions."""
    system, *messages = request["messages"]
    (choice,) = response["choices"]
    reply = {**choice["message"], "role": "assistant"}
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.system_instructions": [{"type": "text", "content": system["content"]}],
        "gen_ai.input.messages": [to_parts(message) for message in messages],
        "gen_ai.output.messages": [{**to_parts(reply), "finish_reason": choice["finish_reason"]}],
        "gen_ai.tool.definitions": [{"type": "function", **tool["function"]} for tool in request["tools"]],
    }


def to_parts(message):
    """A chat message as the GenAI conventions have it."""
    if message["role"] == "tool":
        part = {"type": "tool_call_response", "id": message["tool_call_id"], "response": message["content"]}
        return {"role": "tool", "parts": [part]}
    parts = []
    if message.get("reasoning_content"):
        parts.append({"type": "reasoning", "content": message["reasoning_content"]})
    if message.get("content"):
        parts.append({"type": "text", "content": message["content"]})
    for call in message.get("tool_calls") or []:
        function = call["function"]
        arguments = json.loads(function["arguments"])
        parts.append({"type": "tool_call", "id": call["id"], "name": function["name"], "arguments": arguments})
    return {"role": message["role"], "parts": parts}


def to_otlp(spans):
    """Spans as the JSON of OTLP."""
    return {"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {"name": "s"}, "spans": spans}]}]}


def to_pairs(attributes):
    """Attributes as the JSON of OTLP."""
    return [{"key": key, "value": to_value(value)} for key, value in attributes.items()]


def to_value(value):
    """A value as the JSON of OTLP."""
    match value:
        case bool():
            return {"boolValue": value}
        case dict():
            return {"kvlistValue": {"values": to_pairs(value)}}
        case list():
            return {"arrayValue": {"values": [to_value(item) for item in value]}}
        case int():
            return {"intValue": str(value)}
    return {"stringValue": value}


EXPORTS = [
    *(litellm, langfuse, langfuse_blob),
    *(openrouter, openrouter_span),
    *(opentelemetry, opentelemetry_event),
]
SOURCES = dict(zip(EXPORTS, ["openai-chat", *["langfuse"] * 2, "openrouter", *["opentelemetry"] * 3], strict=True))
