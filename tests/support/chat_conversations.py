"""Conversations of the rendering tests: with reasoning, with tools, in several forms."""


def call(name, /, **arguments):
    return {"id": f"call_{name[:4]}", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name, parameter):
    schema = {"type": "object", "properties": {parameter: {"type": "string", "description": parameter}}}
    parameters = schema | {"required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": f"{name} it", "parameters": parameters}}


TOOLS = [tool("find_city", "city"), tool("read_user", "user_id")]
CHAT = [
    {"role": "user", "content": "Which one is it?"},
    {"role": "assistant", "reasoning_content": "We compare both.", "content": "The first one."},
    {"role": "user", "content": "Why so?"},
    {"role": "assistant", "reasoning_content": "We recall the rule.", "content": "Because of the rule."},
]
AGENT = [
    {"role": "user", "content": "Where is Mia?"},
    {"role": "assistant", "reasoning_content": "Look it up.", "tool_calls": [call("read_user", user_id="u7")]},
    {"role": "tool", "tool_call_id": "call_read", "name": "read_user", "content": "Mia, in the north"},
    {"role": "assistant", "reasoning_content": "Still vague.", "tool_calls": [call("find_city", city="Bodø")]},
    {"role": "tool", "tool_call_id": "call_find", "name": "find_city", "content": "Found"},
    {"role": "assistant", "reasoning_content": "Now I know.", "content": "In Bodø."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "reasoning_content": "The tool said so.", "content": "Quite sure."},
]


def without_reasoning(messages):
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]


def inline(messages):
    return [
        {"role": "assistant", "content": f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}"}
        if "reasoning_content" in m
        else m
        for m in messages
    ]


def as_blocks(messages):
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def completion(sample, tokenizer):
    return tokenizer.decode(sample.token_ids[sample.prompt_length :])


def prompt(sample, tokenizer):
    return tokenizer.decode(sample.token_ids[: sample.prompt_length])
