"""What proxies and observability tools export: what only some of their lines have, and what is refused."""

import json

import pytest

from support.conversations import TOOLS
from support.log_exports import (
    EXPORTS,
    SOURCES,
    langfuse,
    langfuse_blob,
    litellm,
    openrouter,
    opentelemetry,
    to_attributes,
    to_otlp,
    to_pairs,
)
from support.logs import assistant, get_error, import_entries, import_files, user
from trl_singlepass.data.bad_rows import BadRows


SYSTEM = {"role": "system", "content": "Be brief."}
REQUEST = {"model": "m", "messages": [SYSTEM, user("Hi.")], "tools": TOOLS}
EXAMPLE = {"messages": [SYSTEM, user("Hi."), assistant("Hello.")], "tools": TOOLS}


def reply(message=None, reason="stop"):
    return {"choices": [{"message": message or assistant("Hello."), "finish_reason": reason}]}


@pytest.mark.parametrize("export", EXPORTS, ids=lambda export: export.__name__)
def test_an_export_is_recognised(tmp_path, export):
    rows, report = import_entries(tmp_path, "auto", [export(REQUEST, reply())])
    assert rows == [EXAMPLE]
    assert report.detected == SOURCES[export]
    assert str(report).startswith(f"Format: {SOURCES[export]}\n")


def test_bad_lines_do_not_hide_the_format(tmp_path):
    lines = [litellm(REQUEST, {}) | {"error_str": "busy"}, litellm(REQUEST, reply())]
    assert import_entries(tmp_path, "auto", lines, bad_lines=BadRows.DROP)[0] == [EXAMPLE]


def test_files_of_several_formats_are_refused(tmp_path):
    for export in (litellm, langfuse):
        (tmp_path / f"{export.__name__}.jsonl").write_text(json.dumps(export(REQUEST, reply())))
    with pytest.raises(ValueError, match=r"langfuse \(.*openai-chat \("):
        import_files("auto", tmp_path)


def test_anthropic_generations_of_langfuse(tmp_path):
    output = {"role": "assistant", "content": [{"type": "text", "text": "Hello."}], "stop_reason": "end_turn"}
    line = langfuse(REQUEST, reply()) | {"input": {"system": "Be brief.", "messages": [user("Hi.")]}, "output": output}
    assert import_entries(tmp_path, "langfuse", [line])[0] == [{"messages": EXAMPLE["messages"]}]


@pytest.mark.parametrize("output", ["Hello.", '{"answer": "Hello."}', [assistant("Hello.")], reply()])
def test_outputs_of_langfuse(tmp_path, output):
    text = output if isinstance(output, str) else "Hello."
    line = langfuse(REQUEST, reply()) | {"output": output}
    assert import_entries(tmp_path, "langfuse", [line])[0][0]["messages"][-1] == assistant(text)


@pytest.mark.parametrize("key", ["observations", "data"])
def test_observations_in_a_list(tmp_path, key):
    lines = [{key: [{"id": "s", "traceId": "t", "type": "SPAN", "input": "x"}, langfuse(REQUEST, reply())]}]
    assert import_entries(tmp_path, "auto", lines)[0] == [EXAMPLE]


def test_one_bad_span_leaves_the_others(tmp_path):
    spans = [{"attributes": to_pairs(to_attributes(REQUEST, reply(reason=reason)))} for reason in ("length", "stop")]
    rows, report = import_entries(tmp_path, "opentelemetry", [to_otlp(spans)], bad_lines=BadRows.DROP)
    assert rows == [EXAMPLE]
    assert report.num_bad_lines == 1


def test_spans_may_have_messages_of_chat_completions_and_reasons_of_their_own(tmp_path):
    attributes = to_attributes(REQUEST, reply())
    attributes["gen_ai.input.messages"] = [user("Hi.")]
    attributes["gen_ai.output.messages"] = [assistant("Hello.")]
    attributes["gen_ai.response.finish_reasons"] = ["stop"]
    assert import_entries(tmp_path, "opentelemetry", [{"attributes": attributes}])[0] == [EXAMPLE]


def test_results_of_tools_that_are_no_text_are_json(tmp_path):
    attributes = to_attributes(REQUEST, reply())
    parts = [{"type": "tool_call_response", "id": "c", "response": {"sum": 3}}]
    attributes["gen_ai.input.messages"].append({"role": "tool", "parts": parts})
    (row,) = import_entries(tmp_path, "opentelemetry", [{"attributes": attributes}])[0]
    assert row["messages"][2] == {"role": "tool", "content": '{"sum": 3}', "tool_call_id": "c"}


def without(line, key):
    return {name: value for name, value in line.items() if name != key}


def span(**changes):
    return {"attributes": to_attributes(REQUEST, reply()) | {f"gen_ai.{key}": value for key, value in changes.items()}}


@pytest.mark.parametrize(
    ("source", "line", "reason"),
    [
        ("openai-chat", litellm(REQUEST, {}) | {"error_str": "busy"}, "The response is an error: 'busy'"),
        ("openai-chat", litellm(REQUEST, reply(reason="length")), "its finish_reason is 'length'"),
        ("langfuse", langfuse(REQUEST, reply()) | {"level": "ERROR", "statusMessage": "busy"}, "an error: 'busy'"),
        ("langfuse", langfuse(REQUEST, reply()) | {"output": None}, "The 'output' of the observation"),
        ("langfuse", langfuse(REQUEST, reply()) | {"output": {"answer": 3}}, "The 'output' of the observation"),
        ("langfuse", langfuse(REQUEST, reply()) | {"input": "Hi."}, "'messages' has text"),
        ("langfuse", langfuse_blob(REQUEST, reply()) | {"tool_definitions": {"add": "x"}}, "'add' is text"),
        ("openrouter", openrouter(REQUEST, reply(reason=None)), "its finish_reason is 'None'"),
        ("openrouter", without(openrouter(REQUEST, reply())["trace"], "output"), "'output' is missing"),
        ("opentelemetry", opentelemetry(REQUEST, reply(reason="length")), "its finish_reason is 'length'"),
        ("opentelemetry", span(**{"output.messages": None}), "'gen_ai.output.messages' is missing"),
        ("opentelemetry", span(**{"output.messages": "x"}), "'gen_ai.output.messages' is text that is not JSON"),
        ("opentelemetry", span(**{"tool.definitions": [{"type": "web_search"}]}), "the type 'web_search'"),
        (
            "opentelemetry",
            span(**{"input.messages": [{"role": "user", "parts": [{"type": "blob", "modality": "image"}]}]}),
            "a part of type 'blob'",
        ),
    ],
)
def test_lines_that_cannot_be_trained_as_they_were_sent_are_bad(tmp_path, source, line, reason):
    assert reason in get_error(tmp_path, source, [line])
