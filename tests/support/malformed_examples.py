"""Examples as users have them that are not conversations, each with the error that it must raise."""

HI = {"role": "user", "content": "Hi."}
HELLO = {"role": "assistant", "content": "Hello."}
SHAREGPT = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]
RESULT = {"role": "tool", "content": "3"}


def answered(**fields):
    return {"messages": [HI, {**HELLO, **fields}]}


def asked(**fields):
    return {"messages": [{**HI, **fields}, HELLO]}


def calling(*calls):
    return {"messages": [HI, {"role": "assistant", "content": "", "tool_calls": list(calls)}, RESULT, HELLO]}


MALFORMED = {
    "no messages at all": ({"messages": None}, "'messages' is null, expected a list of messages"),
    "bytes": ({"messages": b"Hi."}, "'messages' is bytes, expected a list of messages"),
    "one message": ({"messages": HI}, "'messages' is an object, expected a list"),
    "no message": ({"messages": []}, "at least one assistant message to train, got messages with the roles: none"),
    "no assistant": ({"messages": [HI]}, "at least one assistant message to train, .* roles: user"),
    "assistant first": ({"messages": [HELLO]}, "Message 0 .* begins the conversation"),
    "two conversations": ({"messages": [[HI, HELLO], [HI, HELLO]]}, "Message 0 is a list, .* a row of its own"),
    "a null message": ({"messages": [HI, None, HELLO]}, "Message 1 is null, expected an object with 'role'"),
    "a message that is text": ({"messages": ["Hi.", HELLO]}, "Message 0 is text, expected an object"),
    "no role": ({"messages": [{"content": "Hi."}, HELLO]}, r"Message 0 has no 'role'; it has \['content'\]"),
    "null role": (answered(role=None), "Message 1 has no 'role'"),
    "role of a number": (asked(role=0), "Message 0 has 'role' that is a number"),
    "a call of LLaMA-Factory": (
        {"conversations": [SHAREGPT[0], {"from": "function_call", "value": "{}"}, SHAREGPT[1]]},
        "Message 1 has the role 'function_call', .* docs/migrating.md",
    ),
    "a call of ms-swift": (
        {"messages": [HI, {"role": "tool_call", "content": "{}"}, HELLO]},
        "Message 1 has the role 'tool_call', .* an assistant message with 'tool_calls'",
    ),
    "system of an object": ({"messages": [HI, HELLO], "system": {"os": "linux"}}, "'system' is an object, .* Rename"),
    "two system prompts": (
        {"messages": [{"role": "system", "content": "Be brief."}, HI, HELLO], "system": "Be kind."},
        r"two system prompts: the column 'system' and message 0 \('system'\). Keep one",
    ),
    "from and value": ({"messages": SHAREGPT}, "Message 0 has 'from' and 'value' .* Rename the column to 'conv"),
    "ShareGPT without value": ({"conversations": [{"from": "human"}, SHAREGPT[1]]}, "Message 0 .* no 'content'"),
    "no question": (asked(content=None), r"Message 0 \('user'\) has no 'content'"),
    "no parts": (asked(content=[]), r"Message 0 \('user'\) has no 'content'"),
    "content of a number": (asked(content=3), "Message 0 has 'content' that is a number, expected text"),
    "answer is null": (answered(content=None), "Message 1 says nothing: it has no content, reasoning or tool calls"),
    "nested content": (asked(content=[["Hi."]]), "Part 0 of the content of message 0 is a list"),
    "null part": (asked(content=[None]), "Part 0 of the content of message 0 is null"),
    "part without text": (asked(content=[{"type": "text"}]), "Part 0 of the content of message 0 has no 'text'"),
    "part of a number": (asked(content=[{"type": "text", "text": 3}]), "message 0 has 'text' that is a number"),
    "image": (
        asked(content=[{"type": "image"}]),
        "is of the type 'image', .*processing_class",
    ),
    "reasoning of a number": (answered(reasoning_content=5), "Message 1 has 'reasoning_content' that is a number"),
    "calls as text": (answered(tool_calls="add(1)"), "Message 1 has 'tool_calls' that is text, expected a list"),
    "calls as JSON": (answered(tool_calls="[]"), "Message 1 has 'tool_calls' .* Decode the JSON"),
    "calls as an object": (answered(tool_calls={"name": "add"}), "'tool_calls' that is an object, .* in a list"),
    "call as text": (calling("add"), "Call 0 of message 1 is text, expected an object"),
    "call without a name": (calling({"function": {"arguments": {}}}), "Call 0 of message 1 has no 'name'"),
    "arguments of a list": (calling({"name": "add", "arguments": [1]}), "'arguments' that is a list, expected"),
    "result of an object": (
        {
            "messages": [
                *calling({"name": "add", "arguments": {}})["messages"][:2],
                {**RESULT, "content": {"is": "x"}},
                HELLO,
            ]
        },
        "Message 2 .* the template drops its content, which is an object. Store it as text, with json.dumps",
    ),
    "tools of a number": ({**answered(), "tools": "5"}, "'tools' is a number, expected a list of tools"),
    "tools of an object": ({**answered(), "tools": {"name": "add"}}, "'tools' is an object, .* in a list"),
    "tools that are no JSON": ({**answered(), "tools": "[{"}, "Expected JSON in the column 'tools'"),
    "tool of a number": ({**answered(), "tools": [5]}, "Tool 0 is a number, expected an object"),
    "tool with a function as text": ({**answered(), "tools": [{"function": "add"}]}, "Tool 0 has 'function' that is"),
    "tool of a list name": ({**answered(), "tools": [{"name": ["a"]}]}, "Tool 0 has 'name' that is a list"),
    "arguments of the template": ({**answered(), "chat_template_kwargs": "[1]"}, "'chat_template_kwargs' is a list"),
    "reserved argument": ({**answered(), "chat_template_kwargs": {"tokenize": True}}, "has 'tokenize', which is set"),
    "weight of text": (answered(weight="x"), "Message 1 has weight='x'"),
    "history": ({**answered(), "history": "all"}, "history='all' is not one of"),
    "completion is text": ({"prompt": [HI], "completion": "Hello."}, "'completion' is text, expected a list"),
    "completion is null": ({"prompt": [HI], "completion": None}, "'completion' is null, expected a list"),
    "completion is empty": ({"prompt": [HI], "completion": []}, "'completion' is empty, so there is nothing to train"),
    "turns is null": ({"turns": None}, "'turns' is null, expected a list of turns"),
    "null id": ({"turns": [{"prompt_ids": [1, None], "completion_ids": [2]}]}, "not a list of token ids: .1, None"),
}

# A log of two conversations, in which the second, third and fifth turns are malformed.
TURN = {"prompt_ids": [5, 6], "completion_ids": [7]}
LOG = [
    {"conversation_id": "a", **TURN},
    {"conversation_id": "b", **TURN, "completion_ids": None},
    {"conversation_id": None, **TURN},
    {"conversation_id": "b", **TURN, "completion_ids": [8]},
    {"conversation_id": None, **TURN},
    {"conversation_id": "a", **TURN, "prompt_ids": [5, 6, 7, 9]},
]
