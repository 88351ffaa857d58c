"""The conversation of the agent in `log_servers` as transcripts of other agents, which keep all reasoning."""

import json

from support.log_servers import SCRIPT, SYSTEM, to_anthropic, to_items, to_openai


MESSAGES = [message for said, reply in SCRIPT for message in (*said, reply)]


def get_exchanges():
    """The context and the reply of each request."""
    ends = [index for index, message in enumerate(MESSAGES) if message["role"] == "assistant"]
    return [([SYSTEM, *MESSAGES[:end]], MESSAGES[end]) for end in ends]


def write_claude_code(path):
    """A line per content block of a reply; each result hangs off the line of its call."""
    lines, parent, calls = [], None, {}

    def add(kind, message, follows):
        lines.append({"type": kind, "uuid": str(len(lines)), "parentUuid": follows, "message": message})
        return lines[-1]["uuid"]

    for number, message in enumerate(MESSAGES):
        role, blocks = to_anthropic(message)
        if role == "user":
            parent = add("user", {"role": role, "content": blocks}, calls.get(message.get("tool_call_id"), parent))
            continue
        for block in blocks:
            reply = {"id": f"msg_{number}", "role": role, "model": "m", "content": [block], "stop_reason": None}
            parent = add("assistant", reply, parent)
            calls[block.get("id")] = parent
        lines[-1]["message"]["stop_reason"] = "tool_use" if message.get("tool_calls") else "end_turn"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def write_codex(path):
    """A line per item of a request or a reply."""
    lines = [{"type": "session_meta", "payload": {"id": "s", "base_instructions": {"text": SYSTEM["content"]}}}]
    lines += [{"type": "response_item", "payload": item} for message in MESSAGES for item in to_items(message)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def write_swe_agent(path):
    """A step per reply, with what it was asked."""
    history = [to_history(message) for message in [SYSTEM, *MESSAGES]]
    replies = [index for index, item in enumerate(history) if item["role"] == "assistant"]
    steps = [{"query": history[:index], "response": history[index]["content"]} for index in replies]
    path.write_text(json.dumps({"trajectory": steps, "history": history}), "utf-8")


def to_history(message):
    """A message as an item of SWE-agent's history."""
    item = {"role": message["role"], "content": message.get("content") or "", "agent": "main"}
    if message["role"] == "tool":
        return {**item, "message_type": "observation", "tool_call_ids": [message["tool_call_id"]]}
    if message["role"] != "assistant":
        return {**item, "message_type": "observation"}
    blocks = [block for block in to_anthropic(message)[1] if block["type"] == "thinking"]
    calls = to_openai(message).get("tool_calls")
    return {**item, "message_type": "action", "action": "a", "tool_calls": calls, "thinking_blocks": blocks}
