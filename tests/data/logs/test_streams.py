"""Streamed responses: every form in which they are logged, and streams that cannot be put together."""

import json

import pytest

from support.log_servers import SCRIPT
from support.log_streams import StreamingAnthropicServer, StreamingOpenAIServer, StreamingResponsesServer
from support.logs import get_error, import_entries, user
from trl_singlepass.data.logs import anthropic, openai_chat, openai_responses
from trl_singlepass.data.logs.lines import LogError, LogLine, Place


JOIN = {
    StreamingOpenAIServer: openai_chat.join_chunks,
    StreamingResponsesServer: openai_responses.join_events,
    StreamingAnthropicServer: anthropic.join_events,
}
REPLY = SCRIPT[0][1]
FORMS = {
    "text": lambda text, events: text,
    "events": lambda text, events: events,
    "JSON of the events": lambda text, events: json.dumps(events),
    "JSON of each event": lambda text, events: [json.dumps(event) for event in events],
    "lines": lambda text, events: [*text.split("\n"), "[DONE]"],
    "carriage returns": lambda text, events: text.replace("\r\n", "\n").replace("\n", "\r"),
    "events with their names": lambda text, events: [{"event": "x", "data": event} for event in events],
}


@pytest.mark.parametrize("server", JOIN, ids=lambda server: server.source)
@pytest.mark.parametrize("form", FORMS)
def test_a_stream_adds_up_to_the_response(server, form):
    whole = server.server.reply({}, REPLY)
    text, events = server.reply({}, REPLY), list(server.events(whole))
    line = LogLine(Place("log", 1), {"response": FORMS[form](text, events)})
    _, response = line.get_exchange(JOIN[server])
    assert _trained(response) == _trained(whole)


def _trained(response):
    """A response without what streams lack, and what is empty."""
    if "choices" in response:
        (choice,) = response["choices"]
        message = {key: value for key, value in choice["message"].items() if value and key != "role"}
        return message, choice["finish_reason"]
    return response


@pytest.mark.parametrize("wrap", [lambda stream: stream, lambda stream: {"status": 200, "body": stream}])
@pytest.mark.parametrize("key", ["response", "response_body"])
def test_a_log_may_hold_streams(tmp_path, wrap, key):
    stream = StreamingOpenAIServer.reply({}, {"role": "assistant", "content": "Hello, Ünïcode\u2028line."})
    request = {"messages": [user("Hi.")], "stream": True}
    examples, _ = import_entries(tmp_path, "openai-chat", [{"request": request, key: wrap(stream)}])
    assert examples[0]["messages"][1] == {"role": "assistant", "content": "Hello, Ünïcode\u2028line."}


def test_tokens_of_a_stream(tmp_path):
    chunks = [
        {"prompt_token_ids": [1, 2, 3], "choices": [{"index": 0, "delta": {"role": "assistant"}, "token_ids": None}]},
        {"choices": [{"index": 0, "delta": {"content": "a"}, "token_ids": [4, 5]}]},
        {"choices": [{"index": 0, "delta": {"content": "b"}, "token_ids": [6], "finish_reason": "stop"}]},
    ]
    examples, _ = import_entries(tmp_path, "vllm", [{"request": {"stream": True}, "response": chunks}])
    assert (examples[0]["prompt_ids"], examples[0]["completion_ids"]) == ([1, 2, 3], [4, 5, 6])


def delta(finish_reason=None, index=0, **delta):
    return {"choices": [{"index": index, "delta": delta, "finish_reason": finish_reason}]}


def test_each_choice_has_its_own_parts(tmp_path):
    chunks = [delta(index=i, content=text) for text in ("a", "b") for i in (0, 1)]
    chunks += [delta("stop", index=i, content=str(i), role="assistant") for i in (1, 0)]
    examples, _ = import_entries(tmp_path, "openai-chat", [{"messages": [user("Hi.")], "response": chunks}])
    assert [example["messages"][-1]["content"] for example in examples] == ["ab0", "ab1"]


def test_servers_that_number_no_calls_send_whole_ones():
    calls = [{"id": name, "function": {"name": name, "arguments": "{}"}} for name in ("a", "b")]
    response = openai_chat.join_chunks([delta(tool_calls=[call]) for call in calls])
    assert [call["id"] for call in response["choices"][0]["message"]["tool_calls"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("source", "response", "reason"),
    [
        ("openai-chat", [delta(content="a")], "The reply did not end: its finish_reason is 'None'"),
        ("openai-chat", [delta("length", content="a")], "its finish_reason is 'length'"),
        ("openai-chat", [delta(content="a"), {"error": {"message": "busy"}}], "The response is an error: 'busy'"),
        ("openai-chat", [], "The streamed response has no events"),
        ("openai-chat", "data: [DONE]\n\n", "The streamed response has no events"),
        ("openai-chat", 'data: {"choices": [{"del', 'an event that is not JSON: \'{"choices": [{"del\''),
        ("openai-chat", [3], "an event that is no JSON object"),
        ("openai-chat", [{"text": "a"}], "events of the type 'None' and no end: not those of a Chat"),
        ("openai-chat", [delta(index="a")], "has the index 'a', expected a number"),
        ("openai-chat", [delta(tool_calls=[{"index": 1}])], "a part of tool call 1, and no call 0"),
        ("openai-responses", [{"type": "response.created"}], "events of the type 'response.created' and no end"),
        ("openai-responses", [{"type": "response.completed"}], "'response' is missing"),
        ("anthropic", [{"type": "message_start", "message": {"content": []}}], "its stop_reason is 'None'"),
        (
            "anthropic",
            [{"type": "message_start", "message": {}}, {"type": "content_block_delta", "index": 0, "delta": {}}],
            "'content_block_start' is missing",
        ),
        (
            "anthropic",
            [{"type": "message_start"}, {"type": "error", "error": {"type": "overloaded", "message": "busy"}}],
            "The response is an error: 'busy'",
        ),
    ],
)
def test_streams_that_are_no_whole_reply_are_bad(tmp_path, source, response, reason):
    request = {"input": "Hi."} if source == "openai-responses" else {"messages": [user("Hi.")]}
    assert reason in get_error(tmp_path, source, [{"request": request, "response": response}])


def test_other_errors_of_a_stream_are_those_of_a_line():
    with pytest.raises(LogError, match="'delta' has a number where an object"):
        openai_chat.join_chunks([{"choices": [{"delta": 3}]}])
