"""Examples as users have them that are not conversations, each with the error that it must raise."""

import json


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
    "text": ({"messages": "Hi."}, "'messages' is text, expected a list of messages"),
    "JSON": ({"messages": json.dumps([HI, HELLO])}, "'messages' is text, .* Decode the JSON with json.loads"),
    "bytes": ({"messages": b"Hi."}, "'messages' is bytes, expected a list of messages"),
    "number": ({"messages": 3}, "'messages' is a number"),
    "one message": ({"messages": HI}, "'messages' is an object, expected a list"),
    "columns in an object": ({"messages": {"role": ["user"], "content": ["Hi."]}}, "'messages' is an object"),
    "no message": ({"messages": []}, "at least one assistant message to train, got messages with the roles: none"),
    "no assistant": ({"messages": [HI]}, "at least one assistant message to train, .* roles: user"),
    "assistant first": ({"messages": [HELLO]}, "Message 0 .* begins the conversation"),
    "two conversations": ({"messages": [[HI, HELLO], [HI, HELLO]]}, "Message 0 is a list, .* a row of its own"),
    "a null message": ({"messages": [HI, None, HELLO]}, "Message 1 is null, expected an object with 'role'"),
    "a message that is text": ({"messages": ["Hi.", HELLO]}, "Message 0 is text, expected an object"),
    "a message that is a number": ({"messages": [HI, 5]}, "Message 1 is a number, expected an object"),
    "no role": ({"messages": [{"content": "Hi."}, HELLO]}, r"Message 0 has no 'role'; it has \['content'\]"),
    "empty message": ({"messages": [{}, HELLO]}, "Message 0 has no 'role'; it has no keys"),
    "null role": (answered(role=None), "Message 1 has no 'role'"),
    "role of a number": (asked(role=0), "Message 0 has 'role' that is a number"),
    "role of a list": (asked(role=["user"]), "Message 0 has 'role' that is a list"),
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
    "ShareGPT without from": ({"conversations": [{"value": "Hi."}, *SHAREGPT[1:]]}, "Message 0 has no 'role'"),
    "ShareGPT of a list role": ({"conversations": [{"from": ["x"], "value": ""}]}, "'role' that is a list"),
    "ShareGPT without value": ({"conversations": [{"from": "human"}, SHAREGPT[1]]}, "Message 0 .* no 'content'"),
    "no question": (asked(content=None), r"Message 0 \('user'\) has no 'content'"),
    "no parts": (asked(content=[]), r"Message 0 \('user'\) has no 'content'"),
    "content of a number": (asked(content=3), "Message 0 has 'content' that is a number, expected text"),
    "answer of a number": (answered(content=3), "Message 1 has 'content' that is a number, expected text"),
    "answer of bytes": (answered(content=b"x"), "Message 1 has 'content' that is bytes"),
    "answer of an object": (answered(content={"text": "x"}), "Message 1 has 'content' that is an object"),
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
    "reasoning of a list": (answered(thinking=["We"]), "Message 1 has 'thinking' that is a list"),
    "calls as text": (answered(tool_calls="add(1)"), "Message 1 has 'tool_calls' that is text, expected a list"),
    "calls as JSON": (answered(tool_calls="[]"), "Message 1 has 'tool_calls' .* Decode the JSON"),
    "calls as an object": (answered(tool_calls={"name": "add"}), "'tool_calls' that is an object, .* in a list"),
    "call as text": (calling("add"), "Call 0 of message 1 is text, expected an object"),
    "null call": (calling(None), "Call 0 of message 1 is null"),
    "function as text": (calling({"function": "add"}), "Call 0 of message 1 is text"),
    "call without a name": (calling({"function": {"arguments": {}}}), "Call 0 of message 1 has no 'name'"),
    "call without a function": (calling({"type": "function"}), "Call 0 of message 1 has no 'name'"),
    "call of a null": (calling({"function": {"name": None, "arguments": {}}}), "Call 0 .* has no 'name'"),
    "call without arguments": (
        calling({"function": {"name": "add"}}),
        r"Undefined is not JSON .*\(missing: the call of 'add' in message 1 has no 'arguments'\)",
    ),
    "arguments of a list": (calling({"name": "add", "arguments": [1]}), "'arguments' that is a list, expected"),
    "result of a number": (
        {"messages": [*calling({"name": "add", "arguments": {}})["messages"][:2], {**RESULT, "content": 3}, HELLO]},
        "Message 2 has 'content' that is a number",
    ),
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
    "null tool": ({**answered(), "tools": "[null]"}, "Tool 0 is null"),
    "tool with a function as text": ({**answered(), "tools": [{"function": "add"}]}, "Tool 0 has 'function' that is"),
    "tool of a list name": ({**answered(), "tools": [{"name": ["a"]}]}, "Tool 0 has 'name' that is a list"),
    "arguments of the template": ({**answered(), "chat_template_kwargs": "[1]"}, "'chat_template_kwargs' is a list"),
    "number for the template": ({**answered(), "chat_template_kwargs": 5}, "'chat_template_kwargs' is a number"),
    "reserved argument": ({**answered(), "chat_template_kwargs": {"tokenize": True}}, "has 'tokenize', which is set"),
    "weight of text": (answered(weight="x"), "Message 1 has weight='x'"),
    "history": ({**answered(), "history": "all"}, "history='all' is not one of"),
    "completion is text": ({"prompt": [HI], "completion": "Hello."}, "'completion' is text, expected a list"),
    "prompt is text": ({"prompt": "Hi.", "completion": [HELLO]}, "'prompt' is text, expected a list"),
    "completion is null": ({"prompt": [HI], "completion": None}, "'completion' is null, expected a list"),
    "completion is empty": ({"prompt": [HI], "completion": []}, "'completion' is empty, so there is nothing to train"),
    "turns is null": ({"turns": None}, "'turns' is null, expected a list of turns"),
    "turns is text": ({"turns": "x"}, "'turns' is text, expected a list of turns"),
    "no turn": ({"turns": []}, "at least one turn in 'turns', got none"),
    "turn is text": ({"turns": ["x"]}, "Turn 0 is text, expected an object"),
    "ids as text": (
        {"turns": [{"prompt_ids": "ab", "completion_ids": [2]}]},
        "'prompt_ids' that is not a list of token",
    ),
    "half an id": (
        {"turns": [{"prompt_ids": [1.5], "completion_ids": [2]}]},
        "'prompt_ids' that is not a list of token",
    ),
    "null id": ({"turns": [{"prompt_ids": [1, None], "completion_ids": [2]}]}, "not a list of token ids: .1, None"),
    "nested ids": ({"turns": [{"prompt_ids": [[1]], "completion_ids": [2]}]}, "'prompt_ids' that is not a list"),
    "ragged ids": ({"turns": [{"prompt_ids": [1, [2]], "completion_ids": [2]}]}, "'prompt_ids' that is not a list"),
    "negative id": ({"turns": [{"prompt_ids": [-1], "completion_ids": [2]}]}, "Turn 0 has the token id -1"),
    "no completion": ({"turns": [{"prompt_ids": [1], "completion_ids": []}]}, "Turn 0 has empty 'completion_ids'"),
    "weights as text": (
        {"turns": [{"prompt_ids": [1], "completion_ids": [2], "completion_weights": "x"}]},
        "'completion_weights' that is not a list of numbers",
    ),
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
