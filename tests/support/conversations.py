"""Conversations with reasoning and tool calls in all the forms of datasets, and the texts of their samples."""


def chat(turns, seed=0):
    """Return the messages of a chat with this many user turns, each answered with reasoning."""
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in range(turns):
        number = 10 * seed + turn
        messages += [
            {"role": "user", "content": f"What is {number} + 1?" + " Please." * (turn % 2)},
            {
                "role": "assistant",
                "reasoning_content": f"We add 1 to {number}." + " Simple." * ((seed + turn) % 3),
                "content": f"It is {number + 1}.",
            },
        ]
    return messages


def tool_chat():
    """Return the messages of a chat in which the first answer needs a tool call."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    return [
        {"role": "user", "content": "Add 1 and 2."},
        {"role": "assistant", "reasoning_content": "The tool adds.", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "reasoning_content": "It says 3.", "content": "3."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "reasoning_content": "Polite.", "content": "You are welcome."},
    ]


def expand(messages):
    """Return `prompt` + `completion` rows, one per assistant message: the samples that N-pass trains."""
    return [
        {"prompt": messages[:index], "completion": [message]}
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def plain_chat(turns):
    """A chat without reasoning."""
    return without_reasoning(chat(turns))


def agentic_chat():
    """A row of three user turns, each with two tool-calling steps and an answer: nine assistant messages."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    messages = []
    for turn in range(3):
        messages.append({"role": "user", "content": f"Question {turn}."})
        for step in range(2):
            reasoning = f"Step {step} of {turn}."
            messages.append({"role": "assistant", "reasoning_content": reasoning, "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": "add", "content": f"Result {step} of {turn}."})
        messages.append({"role": "assistant", "reasoning_content": f"Done {turn}.", "content": f"Answer {turn}."})
    return {"messages": messages, "tools": TOOLS}


def call(name, /, **arguments):
    """Return a tool call."""
    return {"id": f"call_{name[:4]}", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool_with(name, properties, required=()):
    """Return the schema of a tool with given parameters."""
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": f"{name} it", "parameters": parameters}}


def tool(name, parameter):
    """Return the schema of a tool with one parameter."""
    return tool_with(name, {parameter: {"type": "string", "description": parameter}}, [parameter])


TOOLS = [tool_with("add", {"a": {"type": "number"}, "b": {"type": "number"}}, ["a", "b"])]
AGENT_TOOLS = [tool("find_city", "city"), tool("read_user", "user_id")]
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
    """Return the messages without `reasoning_content`."""
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]


def inline(messages):
    """Return the messages with their reasoning inside the content, between `<think>` tags."""
    return [
        {"role": "assistant", "content": f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}"}
        if "reasoning_content" in m
        else m
        for m in messages
    ]


def as_blocks(messages):
    """Return the messages with their content as a list of one text part."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def completion(sample, tokenizer):
    """Return the completion of a sample as text."""
    return tokenizer.decode(sample.token_ids[sample.prompt_length :])


def prompt(sample, tokenizer):
    """Return the prompt of a sample as text."""
    return tokenizer.decode(sample.token_ids[: sample.prompt_length])


def text_or_error(render, *args, **kwargs):
    try:
        return render(*args, **kwargs)
    except Exception as error:
        return repr(error)


BOOKING_TOOLS = [
    tool_with("book", {"city": {"type": "string", "enum": ["Oslo", "Bodø"]}, "nights": {"type": "integer"}}, ["city"]),
    tool_with("find", {"query": {"type": "object", "properties": {"name": {"type": "string"}}}}, ["query"]),
    tool_with("stop", {"reason": {"type": ["string", "null"]}}, ["reason"]),
]
