"""Logs of the Messages API."""

import pytest

from support.logs import assistant, get_error, import_entries, user


def text(words):
    return {"type": "text", "text": words}


def thinking(words):
    return {"type": "thinking", "thinking": words, "signature": "c2ln"}


USE = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1, "b": "ü"}}
CALL = {"id": "t1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "ü"}'}}


def entry(messages, reply=None, reason="end_turn", **request):
    content = reply or [text("Hello.")]
    return {
        "request": {"messages": messages, **request},
        "response": {"role": "assistant", "content": content, "stop_reason": reason},
    }


def test_blocks_become_reasoning_text_and_calls(tmp_path):
    reply = [thinking("Hm."), text("One."), text("Two."), USE]
    rows, _ = import_entries(tmp_path, "anthropic", [entry([user("Hi.")], reply, "tool_use")])
    assert rows == [{"messages": [user("Hi."), assistant("One.Two.", reasoning_content="Hm.", tool_calls=[CALL])]}]


def test_the_system_prompt_is_the_first_message_and_tools_have_the_form_of_templates(tmp_path):
    schema = {"type": "object", "properties": {}}
    line = entry(
        [user("Hi.")],
        system=[text("Be "), text("brief.")],
        tools=[{"name": "add", "description": "Add.", "input_schema": schema}],
    )
    rows, report = import_entries(tmp_path, "anthropic", [line])
    assert rows[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert rows[0]["tools"] == [
        {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": schema}}
    ]
    assert report.requests["no system prompt"] == 0


def test_each_result_of_a_tool_is_a_message_and_text_after_it_another(tmp_path):
    uses = [USE, {**USE, "id": "t2"}]
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": "3"},
        {"type": "tool_result", "tool_use_id": "t2", "content": [text("4")], "is_error": True},
        text("Go on."),
    ]
    line = entry([user("Hi."), {"role": "assistant", "content": uses}, user(results)])
    rows, _ = import_entries(tmp_path, "anthropic", [line])
    assert rows[0]["prompt"][2:] == [
        {"role": "tool", "content": "3", "tool_call_id": "t1"},
        {"role": "tool", "content": "4", "tool_call_id": "t2"},
        user("Go on."),
    ]
    assert rows[0]["completion"] == [assistant("Hello.")]


@pytest.mark.parametrize("block", [{"type": "redacted_thinking", "data": "x"}, thinking("")])
def test_withheld_thinking_is_counted(tmp_path, block):
    rows, report = import_entries(tmp_path, "anthropic", [entry([user("Hi.")], [block, text("Hello.")])])
    assert rows == [{"messages": [user("Hi."), assistant("Hello.")]}]
    assert (report.requests["reasoning"], report.requests["hidden reasoning"]) == (0, 1)
    assert "Reasoning: 0 of 1 request; of 1 more the log holds it only in encrypted form" in str(report)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (entry([user("Hi.")], reason="max_tokens"), "its stop_reason is 'max_tokens'"),
        (entry([user("Hi.")], reason="stop_sequence"), "its stop_reason is 'stop_sequence'"),
        (entry([user("Hi.")], reason=None), "its stop_reason is 'None'"),
        (entry([user("Hi.")], [thinking("Hm.")]), "neither text nor tool calls"),
        (entry([user("Hi.")], [text("One."), thinking("Hm."), text("Two.")]), "in the order text, thinking, text"),
        (entry([user("Hi.")], [USE, text("Two.")]), "in the order tool_use, text"),
        (entry([user("Hi.")], [thinking("Hm."), thinking("Oh.")]), "several thinking blocks"),
        (entry([user("Hi.")], [{"type": "server_tool_use", "name": "web_search"}]), "of type 'server_tool_use'"),
        (entry([user([{"type": "image", "source": {}}])]), "a part of type 'image'"),
        (entry([user("Hi."), assistant("He")]), "ends in an assistant message"),
        (entry([user("Hi.")], tools=[{"type": "bash_20250124", "name": "b"}]), "of type 'bash_20250124' has no"),
        ({"request": {"messages": [user("Hi.")]}, "response": {"error": {"message": "busy"}}}, "an error: 'busy'"),
    ],
)  # fmt: skip
def test_lines_that_cannot_be_trained_as_they_were_sent_are_bad(tmp_path, line, reason):
    error = get_error(tmp_path, "anthropic", [entry([user("Hi.")]), line])
    assert "\n- log:2: " in error
    assert reason in error
