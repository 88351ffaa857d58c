"""Logs of the Chat Completions API."""

import json

import pytest

from support.conversations import TOOLS
from support.logs import assistant, get_error, import_entries, user
from trl_singlepass.data.tokenized_turns import tokenized_turns_to_samples


def entry(*messages, reply=None, reason="stop", choice=None, **request):
    message = reply or assistant("Hello.")
    choices = [{"index": 0, "message": message, "finish_reason": reason, **(choice or {})}]
    return {"request": {"messages": list(messages), **request}, "response": {"choices": choices}}


HI = {"messages": [user("Hi."), assistant("Hello.")]}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda request, response: {"request": request, "response": response},
        lambda request, response: {"request": {"body": request}, "response": {"status_code": 200, "body": response}},
        lambda request, response: {
            "request": {"body": json.dumps(request)},
            "response": {"body": json.dumps(response)},
        },
        lambda request, response: {"request_body": request, "response_body": response},
        lambda request, response: {"body": request, "response": response},
        lambda request, response: {**request, "response": response},
        lambda request, response: {**request, **response},
    ],
)
def test_finds_request_and_response_where_proxies_put_them(tmp_path, wrap):
    given = entry(user("Hi."))
    assert import_entries(tmp_path, "openai-chat", [wrap(given["request"], given["response"])])[0] == [HI]


def test_each_choice_is_trained(tmp_path):
    line = entry(user("Hi."))
    line["response"]["choices"].append({"message": assistant("Good day."), "finish_reason": "stop"})
    rows, report = import_entries(tmp_path, "openai-chat", [line])
    assert rows == [HI, {"messages": [user("Hi."), assistant("Good day.")]}]
    assert report.requests["all"] == report.num_turns == 2


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_key_whatever_the_server_calls_it(tmp_path, key):
    rows, report = import_entries(
        tmp_path, "openai-chat", [entry(user("Hi."), reply=assistant("Hello.", **{key: "A greeting."}))]
    )
    assert rows == [{"messages": [user("Hi."), assistant("Hello.", reasoning_content="A greeting.")]}]
    assert report.requests["reasoning"] == 1


def test_keys_without_a_value_and_keys_that_no_template_reads_are_left_out(tmp_path):
    reply = {**assistant("Hello."), "refusal": None, "tool_calls": [], "annotations": [], "provider": {"x": 1}}
    assert import_entries(tmp_path, "openai-chat", [entry(user("Hi."), reply=reply)])[0] == [HI]


def test_tools_and_arguments_of_the_template_are_kept(tmp_path):
    line = entry(user("Hi."), tools=TOOLS, chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    kwargs = {"enable_thinking": False, "reasoning_effort": "low"}
    assert import_entries(tmp_path, "openai-chat", [line])[0] == [
        {**HI, "tools": TOOLS, "chat_template_kwargs": kwargs}
    ]


def test_extra_body_of_the_client_is_a_part_of_the_request(tmp_path):
    line = entry(user("Hi."), extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert import_entries(tmp_path, "openai-chat", [line])[0][0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_text_parts_are_one_text(tmp_path):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i."}]
    assert import_entries(tmp_path, "openai-chat", [entry(user(parts))])[0] == [HI]


def test_calls_without_arguments_have_an_empty_object(tmp_path):
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": ""}}
    rows, _ = import_entries(tmp_path, "openai-chat", [entry(user("Hi."), reply=assistant(None, tool_calls=[call]))])
    assert rows[0]["messages"][1] == {
        "role": "assistant",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
    }


def test_encrypted_reasoning_is_counted(tmp_path):
    reply = assistant("Hello.", reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}])
    report = import_entries(tmp_path, "openai-chat", [entry(user("Hi."), reply=reply)])[1]
    assert (report.requests["reasoning"], report.requests["hidden reasoning"]) == (0, 1)


CHUNK = {"object": "chat.completion.chunk", "choices": []}
IMAGE = [{"type": "image_url", "image_url": {"url": "data:"}}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (entry(user("Hi."), reason="length"), "its finish_reason is 'length'"),
        (entry(user("Hi."), reason=None), "its finish_reason is 'None'"),
        (entry(user("Hi."), choice={"stop_reason": "Observation:"}), "cut at the stop string 'Observation:'"),
        (entry(user("Hi."), reply=assistant(None, reasoning="Hm.")), "neither text nor tool calls"),
        (entry(user("Hi."), reply=assistant(None, refusal="No.")), "has 'refusal'"),
        (entry(user("Hi."), reply=assistant(None, function_call={"name": "f"})), "has 'function_call'"),
        (entry(user(IMAGE)), "a part of type 'image_url': only text is trained"),
        (entry({"role": "function", "name": "f", "content": "1"}), "has the role 'function'"),
        (entry(user("Hi."), functions=[{"name": "f"}]), "The request has 'functions'"),
        (entry(user("Hi."), assistant("He"), continue_final_message=True), "The request has 'continue_final_message'"),
        (entry(user("Hi."), chat_template_kwargs={"tokenize": False}), "'chat_template_kwargs' has 'tokenize'"),
        (entry(user("Hi."), chat_template_kwargs=3), "'chat_template_kwargs' has a number where"),
        (entry(user([{"type": "thinking", "text": "Hm."}])), "a part of type 'thinking': only text is trained"),
        (entry(user("Hi."), assistant("Yes?"), user(None)), "Message 2 ('user') has no 'content'"),
        (entry(), "The request has no messages."),
        (entry({"content": "Hi."}), "'role' is missing"),
        (entry(3), "'messages' has a number where an object is expected"),
        ({"request": {"messages": [user("Hi.")]}, "response": None}, "There is no response"),
        ({"request": {"messages": [user("Hi.")]}, "response": {"choices": []}}, "The response has no choices"),
        ({"request": {"messages": [user("Hi.")]}, "response": {"error": {"message": "busy"}}}, "an error: 'busy'"),
        ({"request": {"messages": [user("Hi.")]}, "response": CHUNK}, "one part of a stream. Log all"),
        ({"request": {"messages": [user("Hi.")]}, "response": [CHUNK]}, "The response has no choices"),
        ({"request": {"messages": [user("Hi.")]}, "response": "data: {}\n\ndata: [DONE]"}, "not those of a Chat"),
        ({"request": "not JSON", "response": {}}, "'request' is text that is not JSON"),
        ({"response": {"choices": [{}]}}, "'messages' is missing"),
    ],
)  # fmt: skip
def test_lines_that_cannot_be_trained_as_they_were_sent_are_bad(tmp_path, line, reason):
    error = get_error(tmp_path, "openai-chat", [entry(user("Hi.")), line])
    assert error.startswith(
        "1 line of the log cannot be trained as it was sent; --bad_lines drop leaves out such lines"
    )
    assert "\n- log:2: " in error
    assert reason in error


# Tokens of vLLM and SGLang -------------------------------------------------------------------------------------------


def vllm(prompt, completion, reason="stop", **keys):
    response = {"prompt_token_ids": prompt, "choices": [{"token_ids": completion, "finish_reason": reason}]}
    return {"request": {"return_token_ids": True}, "response": response, **keys}


def sglang(prompt, completion, reason="stop", matched=2, **info):
    info = {"finish_reason": {"type": reason, "matched": matched}, **info}
    return {"request": {"input_ids": prompt}, "response": {"output_ids": completion, "meta_info": info}}


@pytest.mark.parametrize(("source", "entry"), [("vllm", vllm), ("sglang", sglang)])
def test_samples_are_the_tokens_of_the_log(tmp_path, source, entry):
    rows, report = import_entries(tmp_path, source, [entry([5, 6], [7, 2]), entry([5, 6, 7, 2, 8], [9, 2])])
    samples = [tokenized_turns_to_samples([row])[0] for row in rows]
    assert [sample.token_ids.tolist() for sample in samples] == [[5, 6, 7, 2], [5, 6, 7, 2, 8, 9, 2]]
    assert [sample.prompt_length for sample in samples] == [2, 5]
    assert len({row["conversation_id"] for row in rows}) == 1
    assert "2 examples (2 as tokens) with 2 turns" in str(report)


@pytest.mark.parametrize("key", ["conversation_id", "session_id"])
def test_the_log_may_name_the_conversation(tmp_path, key):
    named = [vllm([5], [2], **{key: "a"}), vllm([5, 2, 6], [2], **{key: 7})]
    assert [row["conversation_id"] for row in import_entries(tmp_path, "vllm", named)[0]] == ["a", "7"]


def test_prompts_of_vllm_may_stand_with_the_choice(tmp_path):
    line = vllm(None, [7, 2])
    line["response"]["choices"][0]["prompt_token_ids"] = [5, 6]
    assert import_entries(tmp_path, "vllm", [line])[0][0]["prompt_ids"] == [5, 6]


def test_tokens_of_sglang_may_stand_with_their_log_probabilities(tmp_path):
    line = sglang([5, 6], None, output_token_logprobs=[[-0.1, 7, None], [-0.2, 2, "x"]], completion_tokens=2)
    assert import_entries(tmp_path, "sglang", [line])[0][0]["completion_ids"] == [7, 2]


@pytest.mark.parametrize(
    ("source", "line", "reason"),
    [
        ("vllm", vllm([5], [7], "length"), "its finish_reason is 'length'"),
        ("vllm", vllm([5], None), "no tokens of the reply. Send requests with 'return_token_ids': true."),
        ("vllm", vllm(None, [7]), "no tokens of the prompt"),
        ("vllm", vllm([5.0], [7]), "'prompt_token_ids' must hold whole numbers only"),
        ("sglang", sglang([5], [7], "length"), "its finish_reason is 'length'"),
        ("sglang", sglang([5], [7], matched="END"), "cut at the stop string 'END'"),
        ("sglang", sglang(None, [7]), "no tokens of the prompt. Send requests with 'input_ids'"),
        ("sglang", sglang([5], [7], completion_tokens=2), "The log has 1 token ids, but 'completion_tokens' is 2"),
        ("sglang", sglang([5], [7], prompt_tokens=2), "The log has 1 token ids, but 'prompt_tokens' is 2"),
    ],
)
def test_lines_without_usable_tokens_are_bad(tmp_path, source, line, reason):
    good = vllm([5], [2]) if source == "vllm" else sglang([5], [2])
    error = get_error(tmp_path, source, [good, line])
    assert "\n- log:2: " in error
    assert reason in error
