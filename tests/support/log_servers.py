"""
An agent, servers that log what it sends (two OpenAI-compatible ones and an Anthropic one), and transcripts of its own.

The agent keeps, apart from the log, what it sent and what came back as chat messages: what an import must find again.
"""

import json

from support.conversations import TOOLS


SYSTEM = {"role": "system", "content": "Be brief."}


def add(call_id, a, b):
    function = {"name": "add", "arguments": {"a": a, "b": b}}
    return {"id": call_id, "type": "function", "function": function}


# What users and tools say, and what the model answers to it.
SCRIPT = [
    (
        [{"role": "user", "content": "Add 1 and 2, and 3 and 4."}],
        {
            "role": "assistant",
            "content": "I use the tool.",
            "reasoning_content": "Two sums.",
            "tool_calls": [add("call_1", 1, 2), add("call_2", 3, 4)],
        },
    ),
    (
        [
            {"role": "tool", "content": "3", "tool_call_id": "call_1"},
            {"role": "tool", "content": "7", "tool_call_id": "call_2"},
        ],
        {"role": "assistant", "content": "3 and 7.", "reasoning_content": "It says 3 and 7."},
    ),
    (
        [{"role": "user", "content": "And 5 and 6? Ünïcode “quotes”."}],
        {"role": "assistant", "reasoning_content": "One more.", "tool_calls": [add("call_3", 5, 6)]},
    ),
    (
        [{"role": "tool", "content": "11", "tool_call_id": "call_3"}],
        {"role": "assistant", "content": "11.", "reasoning_content": "Done."},
    ),
    ([{"role": "user", "content": "Thanks."}], {"role": "assistant", "content": "You are welcome."}),
]


class OpenAIServer:
    """Chat Completions API, with the reasoning of vLLM."""

    source = "openai-chat"

    @staticmethod
    def request(messages):
        return {"model": "m", "messages": [to_openai(message) for message in messages], "tools": TOOLS}

    @staticmethod
    def reply(body, message):
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        sent = {"refusal": None, "content": None, "tool_calls": [], **to_openai(message)}
        choice = {"index": 0, "message": sent, "finish_reason": reason, "stop_reason": None}
        return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice]}


class AnthropicServer:
    """Messages API, with extended thinking."""

    source = "anthropic"

    @staticmethod
    def request(messages):
        schema = TOOLS[0]["function"]
        tool = {k: schema[k] for k in ("name", "description")} | {"input_schema": schema["parameters"]}
        turns = []
        for message in messages[1:]:
            role, blocks = to_anthropic(message)
            if turns and turns[-1]["role"] == role:  # the results of one message's calls are one message
                turns[-1]["content"] += blocks
            else:
                turns.append({"role": role, "content": blocks})
        system = [{"type": "text", "text": messages[0]["content"], "cache_control": {"type": "ephemeral"}}]
        return {"model": "m", "max_tokens": 99, "system": system, "messages": turns, "tools": [tool]}

    @staticmethod
    def reply(body, message):
        reason = "tool_use" if message.get("tool_calls") else "end_turn"
        return {"type": "message", "role": "assistant", "content": to_anthropic(message)[1], "stop_reason": reason}


class ResponsesServer:
    """Responses API."""

    source = "openai-responses"

    @staticmethod
    def request(messages):
        tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
        items = [item for message in messages[1:] for item in to_items(message)]
        return {"model": "m", "instructions": messages[0]["content"], "input": items, "tools": tools}

    @staticmethod
    def reply(body, message):
        return {"id": "resp_1", "object": "response", "status": "completed", "output": to_items(message)}


def to_items(message):
    """A chat message as items of the Responses API."""
    if message["role"] == "tool":
        return [{"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]}]
    items = []
    if message.get("reasoning_content"):
        content = [{"type": "reasoning_text", "text": message["reasoning_content"]}]
        items.append({"type": "reasoning", "summary": [], "content": content})
    if message.get("content"):
        kind = "output_text" if message["role"] == "assistant" else "input_text"
        content = [{"type": kind, "text": message["content"]}]
        items.append({"type": "message", "role": message["role"], "content": content})
    for call in to_openai(message).get("tool_calls", []):
        items.append({"type": "function_call", "call_id": call["id"], **call["function"]})
    return items


def to_openai(message):
    """A chat message as it goes over the wire: arguments are JSON."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def to_anthropic(message):
    """Role and content blocks of a chat message."""
    if message["role"] == "tool":
        return "user", [{"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": message["content"]}]
    blocks = []
    if message.get("reasoning_content"):
        blocks.append({"type": "thinking", "thinking": message["reasoning_content"], "signature": "c2ln"})
    if message.get("content"):
        blocks.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls", []):
        function = call["function"]
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": function["arguments"]})
    return message["role"], blocks


def run_agent(server, log, *, echoes_reasoning):
    """
    Hold the conversation of `SCRIPT` with a server that logs it, and say whether the agent sends reasoning back.

    Returns the context and the reply of each request, as chat messages.
    """
    context, exchanges, lines = [SYSTEM], [], []
    for said, reply in SCRIPT:
        context = [*context, *said]
        body = server.request(context)
        lines.append(json.dumps({"request": body, "response": server.reply(body, reply)}) + "\n")
        exchanges.append((context, reply))
        kept = reply if echoes_reasoning else {k: v for k, v in reply.items() if k != "reasoning_content"}
        context = [*context, kept]
    log.write_text("".join(lines), "utf-8")
    return exchanges
