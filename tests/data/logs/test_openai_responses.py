"""Logs of the Responses API."""

import pytest

from support.logs import assistant, get_error, import_entries, user


def message(text):
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def reasoning(text=None):
    content = [] if text is None else [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Sum."}], "content": content}


def call(name="add", call_id="c1"):
    return {"type": "function_call", "name": name, "arguments": '{"a": 1}', "call_id": call_id}


def output(text, call_id="c1"):
    return {"type": "function_call_output", "call_id": call_id, "output": text}


def called(name="add", call_id="c1", arguments='{"a": 1}'):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def entry(given, *items, status="completed", response_id=None, **request):
    response = {"id": response_id, "status": status, "output": list(items) or [message("Hello.")]}
    return {"request": {"input": given, **request}, "response": response}


def test_items_of_a_reply_are_one_message(tmp_path):
    items = [reasoning("Hm."), message("One."), call(), call(call_id="c2")]
    rows, report = import_entries(tmp_path, "openai-responses", [entry("Hi.", *items)])
    reply = assistant("One.", reasoning_content="Hm.", tool_calls=[called(), called(call_id="c2")])
    assert rows == [{"messages": [user("Hi."), reply]}]
    assert (report.requests["reasoning"], report.requests["hidden reasoning"]) == (1, 0)


def test_items_that_the_client_sends_back_are_the_reply_that_it_got(tmp_path):
    items = [reasoning("Hm."), call(), call(call_id="c2")]
    given = [{"role": "user", "content": [{"type": "input_text", "text": "Hi."}]}]
    later = [*given, *items, output("3"), output([{"type": "input_text", "text": "4"}], "c2")]
    rows, _ = import_entries(tmp_path, "openai-responses", [entry("Hi.", *items), entry(later, message("7."))])
    assert rows == [
        {
            "messages": [
                user("Hi."),
                {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [called(), called(call_id="c2")]},
                {"role": "tool", "content": "3", "tool_call_id": "c1"},
                {"role": "tool", "content": "4", "tool_call_id": "c2"},
                assistant("7."),
            ]
        }
    ]


def test_two_replies_in_a_row_stay_two_messages(tmp_path):
    rows, _ = import_entries(tmp_path, "openai-responses", [entry([user("Hi."), message("One."), message("Two.")])])
    assert rows[0]["prompt"] == [user("Hi."), assistant("One."), assistant("Two.")]


def test_summaries_and_encrypted_reasoning_are_not_trained_but_counted(tmp_path):
    items = [{**reasoning(), "encrypted_content": "x"}, message("Hello.")]
    rows, report = import_entries(tmp_path, "openai-responses", [entry("Hi.", *items)])
    assert rows == [{"messages": [user("Hi."), assistant("Hello.")]}]
    assert (report.requests["reasoning"], report.requests["hidden reasoning"]) == (0, 1)


def test_instructions_tools_and_effort(tmp_path):
    schema = {"type": "object", "properties": {}}
    tools = [
        {"type": "function", "name": "add", "description": "Add.", "parameters": schema, "strict": True},
        {"type": "custom", "name": "patch"},
    ]
    line = entry("Hi.", instructions="Be brief.", tools=tools, reasoning={"effort": "high", "summary": "auto"})
    (row,) = import_entries(tmp_path, "openai-responses", [line])[0]
    assert row["messages"][0] == {"role": "system", "content": "Be brief."}
    assert row["chat_template_kwargs"] == {"reasoning_effort": "high"}
    assert row["tools"][0] == {
        "type": "function",
        "function": {"name": "add", "description": "Add.", "parameters": schema},
    }
    assert row["tools"][1]["function"]["parameters"]["required"] == ["input"]


def test_a_call_of_a_tool_that_takes_text_has_it_as_its_input(tmp_path):
    custom = {"type": "custom_tool_call", "name": "patch", "input": "+ ü", "call_id": "c1"}
    (row,) = import_entries(tmp_path, "openai-responses", [entry("Hi.", custom)])[0]
    assert row["messages"][1]["tool_calls"] == [called("patch", arguments='{"input": "+ ü"}')]


def test_earlier_responses_are_context_wherever_they_are_in_the_log(tmp_path):
    first = entry("Hi.", reasoning("Hm."), message("Hello."), response_id="r1", instructions="Be brief.")
    second = entry("Who?", message("I."), response_id="r2", previous_response_id="r1", instructions="Be brief.")
    third = entry("Why?", message("So."), response_id="r3", previous_response_id="r2", instructions="Be brief.")
    rows, _ = import_entries(tmp_path, "openai-responses", [third, first, second])
    system, hello = {"role": "system", "content": "Be brief."}, assistant("Hello.", reasoning_content="Hm.")
    conversation = [system, user("Hi."), hello, user("Who?"), assistant("I."), user("Why?"), assistant("So.")]
    assert rows == [{"messages": conversation}]


def test_instructions_do_not_carry_over(tmp_path):
    first = entry("Hi.", response_id="r1", instructions="Be brief.")
    second = entry("Who?", message("I."), previous_response_id="r1")
    rows, report = import_entries(tmp_path, "openai-responses", [first, second])
    assert rows[1]["prompt"] == [user("Hi."), assistant("Hello."), user("Who?")]
    assert report.requests["no system prompt"] == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (entry("Hi.", status="incomplete"), "its status is 'incomplete'"),
        (entry("Hi.", previous_response_id="r9"), "'r9' is not in the log"),
        (entry("Hi.", conversation="conv_1"), "The request has 'conversation'"),
        (entry("Hi.", prompt={"id": "p"}), "The request has 'prompt'"),
        (entry("Hi.", tools=[{"type": "web_search"}]), "A tool has the type 'web_search'"),
        (entry("Hi.", reasoning("Hm.")), "neither text nor tool calls"),
        (entry("Hi.", call(), message("One.")), "in the order function_call, message"),
        (entry("Hi.", reasoning("Hm."), reasoning("Oh."), message("One.")), "in the order reasoning, reasoning"),
        (entry("Hi.", {"type": "web_search_call", "id": "w"}), "has the type 'web_search_call'"),
        (entry("Hi.", {**call(), "namespace": "mcp"}), "in the namespace 'mcp'"),
        (entry([{"type": "item_reference", "id": "m"}]), "has the type 'item_reference'"),
        (entry([{"role": "user", "content": [{"type": "input_image"}]}]), "a part of type 'input_image'"),
        (entry(None), "'input' is missing"),
    ],
)
def test_lines_that_cannot_be_trained_as_they_were_sent_are_bad(tmp_path, line, reason):
    error = get_error(tmp_path, "openai-responses", [entry("Hi."), line])
    assert "\n- log:2: " in error
    assert reason in error
