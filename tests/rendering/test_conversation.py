"""Dataset rows as conversations: columns, roles, what Arrow adds and what an error says."""

import json

import pytest
from datasets import Dataset
from trl import maybe_convert_to_chatml

from support.chat_tokenizers import make_tokenizer
from support.conversations import BOOKING_TOOLS, call, tool_with
from trl_singlepass.rendering.conversation import Conversation
from trl_singlepass.rendering.samples import RenderingError, render_example, render_samples


MESSAGES = [
    {"role": "user", "content": "A room, please."},
    {"role": "assistant", "reasoning_content": "First who.", "tool_calls": [call("find", query={"name": "Mia"})]},
    {"role": "tool", "tool_call_id": "call_find", "content": "Mia"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [call("book", city="Oslo", nights=2), call("stop", reason=None)],
    },
    {"role": "tool", "tool_call_id": "call_book", "content": "Done"},
    {"role": "assistant", "reasoning_content": "All done.", "content": "Booked."},
]
PLAIN = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


def ids(samples):
    return [sample.token_ids.tolist() for sample in samples]


def through_arrow(*rows):
    return list(Dataset.from_list(list(rows)))


def test_arrow_round_trip_renders_as_the_original(tokenizer):
    stored = through_arrow({"messages": MESSAGES, "tools": BOOKING_TOOLS}, {"messages": PLAIN, "tools": None})
    arguments = stored[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert "nights" in arguments  # what Arrow adds: without it this test shows nothing
    assert arguments["nights"] is None
    assert ids(render_example(stored[0], tokenizer)) == ids(render_samples(MESSAGES, tokenizer, tools=BOOKING_TOOLS))
    assert ids(render_example(stored[1], tokenizer)) == ids(render_samples(PLAIN, tokenizer))


def test_arrow_keeps_nulls_that_the_schema_requires():
    (stored,) = through_arrow({"messages": MESSAGES, "tools": BOOKING_TOOLS})
    calls = [c["function"] for m in Conversation.from_example(stored).messages for c in m.get("tool_calls") or []]
    assert [c["arguments"] for c in calls] == [
        {"query": {"name": "Mia"}},
        {"city": "Oslo", "nights": 2},
        {"reason": None},
    ]
    without_schema = Conversation.from_example({"messages": stored["messages"]}).messages
    assert without_schema[3]["tool_calls"][1]["function"]["arguments"] == {}


def test_rows_that_arrow_did_not_make_stay_as_they_are():
    find = tool_with("find", {"name": {"type": "string", "default": None}, "age": {"default": None}})
    tools = [find, BOOKING_TOOLS[0]]
    messages = [MESSAGES[0], {"role": "assistant", "tool_calls": [call("find", name="Mia", age=None), call("stop")]}]
    conversation = Conversation.from_example({"messages": messages, "tools": tools})
    assert conversation.tools == tools
    assert conversation.messages == messages


def test_a_null_argument_stays_where_messages_show_that_arrow_was_not_there():
    messages = [MESSAGES[0], {"role": "assistant", "tool_calls": [call("find", name=None)]}]
    assert Conversation.from_example({"messages": messages}).messages == messages


def test_arrow_adds_no_template_arguments():
    kwargs = [{"enable_thinking": False}, {"reasoning_effort": "low"}]
    stored = through_arrow(*({"messages": PLAIN, "chat_template_kwargs": item} for item in kwargs))
    assert [Conversation.from_example(row).template_kwargs for row in stored] == kwargs


def test_json_columns_keep_their_nulls():
    tools = [tool_with("find", {"name": {"type": "string", "default": None}})]
    messages = [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [call("find", name=None)]}]
    messages[1]["tool_calls"][0]["function"]["arguments"] = '{"name": null}'
    row = {"messages": messages, "tools": json.dumps(tools), "chat_template_kwargs": '{"enable_thinking": false}'}
    conversation = Conversation.from_example(row)
    assert conversation.tools == tools
    assert conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == '{"name": null}'
    assert conversation.template_kwargs == {"enable_thinking": False}


def test_reading_leaves_the_row_alone(tokenizer):
    (row,) = through_arrow({"messages": MESSAGES, "tools": BOOKING_TOOLS})
    before = json.dumps(row)
    render_example(row, tokenizer)
    assert json.dumps(row) == before


@pytest.mark.parametrize("form", [lambda tools: tools, json.dumps, lambda tools: [json.dumps(t) for t in tools]])
def test_tools_may_be_objects_or_json(form, tokenizer):
    row = {"messages": MESSAGES, "tools": form(BOOKING_TOOLS)}
    assert ids(render_example(row, tokenizer)) == ids(render_samples(MESSAGES, tokenizer, tools=BOOKING_TOOLS))


@pytest.mark.parametrize("form", [dict, json.dumps])
def test_template_kwargs_come_from_their_column(form, tokenizer):
    row = {"messages": PLAIN, "chat_template_kwargs": form({"enable_thinking": False})}
    assert ids(render_example(row, tokenizer)) == ids(render_samples(PLAIN, tokenizer, enable_thinking=False))
    with_none = through_arrow(row, {"messages": PLAIN, "chat_template_kwargs": None})[1]
    assert ids(render_example(with_none, tokenizer)) == ids(render_samples(PLAIN, tokenizer))


def test_only_assistant_messages_of_the_completion_are_trained(tokenizer):
    samples = render_example({"prompt": MESSAGES[:2], "completion": MESSAGES[2:], "tools": BOOKING_TOOLS}, tokenizer)
    assert [sample.message_index for sample in samples] == [3, 5]
    assert ids(samples) == ids(render_samples(MESSAGES, tokenizer, tools=BOOKING_TOOLS))[1:]


@pytest.mark.parametrize(("user", "model"), [("human", "gpt"), ("user", "assistant")])
def test_sharegpt_conversations(user, model, tokenizer):
    row = {"conversations": [{"from": user, "value": "Hi."}, {"from": model, "value": "Hello."}]}
    assert ids(render_example(row, tokenizer)) == ids(render_samples(PLAIN, tokenizer))
    assert row["conversations"][0]["from"] == user
    assert maybe_convert_to_chatml(row)["messages"][0]["role"] == user  # TRL converts keys, not roles


SHAREGPT = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": PLAIN},
        {"prompt": PLAIN[:1], "completion": PLAIN[1:]},
        {"conversations": SHAREGPT},
        {"messages": [{"role": "system", "content": "Be brief."}, *PLAIN]},
    ],
    ids=["messages", "prompt", "ShareGPT", "repeated"],
)
def test_a_system_prompt_in_its_own_column_is_the_first_message(columns, tokenizer):
    expected = render_samples([{"role": "system", "content": "Be brief."}, *PLAIN], tokenizer)
    assert ids(render_example({**columns, "system": "Be brief."}, tokenizer)) == ids(expected)
    if "system" not in str(columns):
        for nothing in ("", " ", None):
            assert ids(render_example({**columns, "system": nothing}, tokenizer)) == ids(
                render_samples(PLAIN, tokenizer)
            )


def assistant(**fields):
    return [{"role": "user", "content": "Hi."}, {"role": "assistant", **fields}]


BAD_ROWS = {
    "no columns": (
        {"text": "Hi."},
        r"Row 3: Expected a conversation in 'messages', .* got the columns \['text'\]. Rename the column",
    ),
    "no assistant": (
        {"messages": PLAIN[:1]},
        r"Row 3: Expected at least one assistant message to train, got messages with the roles: user\. Name the role",
    ),
    "no messages": ({"messages": []}, "with the roles: none"),
    "empty prompt": ({"messages": PLAIN[1:]}, "Message 0 .* it begins the conversation, so there is no prompt"),
    "tools are no JSON": ({"messages": PLAIN, "tools": "[{"}, r"Expected JSON in the column 'tools', got '\[\{'"),
    "reasoning under another key": (
        {"messages": assistant(cot="We think.", content="Hello.")},
        r"Message 1 cannot be rendered with the chat template 'qwen3': its reasoning is lost: the template reads "
        r"'reasoning_content', the message has 'cot'\. Rename the key\.",
    ),
    "function_call": (
        {"messages": assistant(content="", function_call={"name": "find", "arguments": "{}"})},
        "its 'function_call' is lost: templates read 'tool_calls'",
    ),
    "literal closing tag": (
        {"messages": assistant(content="Close it with </think> here.")},
        r"its answer 'Close it with </think> here.' is lost or changed\..* literal closing tag",
    ),
    "unknown role": (
        {"messages": [{"role": "expert", "content": "Be brief."}, *PLAIN]},
        r"Message 0 .* the template drops messages of the role 'expert'\. Give it a role that it knows",
    ),
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_bad_rows_say_what_to_do(row, tokenizer):
    given, message = BAD_ROWS[row]
    with pytest.raises(RenderingError, match=message):
        render_example(given, tokenizer, example_index=3)


def test_an_empty_answer_trains_its_stop(tokenizer):
    (sample,) = render_samples(assistant(content=""), tokenizer)
    assert tokenizer.decode(sample.token_ids[sample.prompt_length :]) == "<think>\n\n</think>\n\n<|im_end|>\n"


def test_an_assistant_message_that_opens_a_conversation_is_context(tokenizer):
    (sample,) = render_samples([PLAIN[1], *PLAIN], tokenizer)
    assert sample.message_index == 2
    assert "Hello." in tokenizer.decode(sample.token_ids[: sample.prompt_length])


def test_a_rendering_without_its_prompt_is_refused():
    chat_template = "{{ 'ask' if add_generation_prompt else '' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(RenderingError, match=r"Message 1 .* does not write a generation prompt before this"):
        render_samples(assistant(content="Hello."), make_tokenizer("llama3", chat_template))
