"""Short conversations with reasoning and tool calls, as dataset rows."""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                "required": ["a", "b"],
            },
        },
    }
]


def chat(turns, seed=0):
    """Messages of a chat of that many user turns, each answered with reasoning."""
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
    """Messages of a chat in which an answer needs a tool call, then goes on."""
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
    """`prompt` + `completion` rows, one per assistant message: the samples that N-pass trains."""
    return [
        {"prompt": messages[:index], "completion": [message]}
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def plain_chat(turns):
    """A chat without reasoning."""
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in chat(turns)]


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
