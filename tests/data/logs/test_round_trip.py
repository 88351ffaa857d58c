"""What training sees of an imported log is what the log's requests render to, token by token."""

import json

import pytest
from datasets import Dataset, load_dataset

from support.chat_tokenizers import make_tokenizer
from support.conversations import TOOLS
from support.log_exports import EXPORTS, SOURCES
from support.log_servers import (
    SCRIPT,
    SYSTEM,
    AnthropicServer,
    OpenAIServer,
    ResponsesServer,
    run_agent,
    to_anthropic,
    to_items,
    to_openai,
)
from support.log_streams import StreamingAnthropicServer, StreamingOpenAIServer, StreamingResponsesServer
from trl_singlepass.cli.main import main
from trl_singlepass.data.conversations import example_to_samples
from trl_singlepass.data.dataset_format import holds_turns
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.data.tokenized_turns import gather_turns, tokenized_turns_to_samples


SERVERS = [
    *(OpenAIServer, ResponsesServer, AnthropicServer),
    *(StreamingOpenAIServer, StreamingResponsesServer, StreamingAnthropicServer),
]
TEMPLATES = ["qwen3", "qwen3_8"]  # strips the reasoning of earlier turns; keeps it


@pytest.fixture(params=SERVERS, ids=lambda server: server.__name__)
def server(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["echoes reasoning", "leaves reasoning out"])
def echoes_reasoning(request):
    return request.param


@pytest.fixture
def imported(server, echoes_reasoning, tmp_path):
    """What was exchanged, and the examples that the import makes of its log."""
    log, data = tmp_path / "log.jsonl", tmp_path / "data.jsonl"
    exchanges = run_agent(server, log, echoes_reasoning=echoes_reasoning)
    source = server.source if echoes_reasoning else "auto"
    return exchanges, import_to(data, source, log)


def import_to(data, source, log, *options):
    """Run the command; return the examples that it writes."""
    assert main(["import", source, *map(str, [log, "-o", data, *options])]) == 0
    return [json.loads(line) for line in data.read_text("utf-8").splitlines()]


def render(example, tokenizer):
    return example_to_samples(example, 0, tokenizer, RowSettings()).samples


def served(tokenizer, context, reply):
    """Prompt and completion of a request, by nothing but the chat template."""
    prompt = tokenizer.apply_chat_template(context, tools=TOOLS, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*context, reply], tools=TOOLS, tokenize=False)
    assert whole.startswith(prompt)
    completion = whole[len(prompt) :].removesuffix("\n")
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion)]


def assert_samples_are(examples, exchanges, template):
    tokenizer = make_tokenizer(template)
    samples = [sample for example in examples for sample in render(example, tokenizer)]
    assert [split(tokenizer, sample) for sample in samples] == [served(tokenizer, *pair) for pair in exchanges]


@pytest.mark.parametrize("template", TEMPLATES)
def test_samples_are_the_requests_of_the_log(imported, template):
    exchanges, examples = imported
    assert_samples_are(examples, exchanges, template)


@pytest.mark.parametrize("load", ["load_dataset", "from_list"])
def test_samples_are_the_same_when_the_dataset_went_through_arrow(imported, load, tmp_path):
    _, examples = imported
    if load == "load_dataset":
        files = str(tmp_path / "data.jsonl")
        dataset = load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    else:
        dataset = Dataset.from_list(examples)
    assert holds_turns(dataset)
    tokenizer = make_tokenizer("qwen3_8")
    before, after = (
        [sample.token_ids.tolist() for row in rows for sample in render(row, tokenizer)]
        for rows in (examples, dataset)
    )
    assert after == before


# The conversation as transcripts of other agents, which keep all reasoning -------------------------------------------


MESSAGES = [message for said, reply in SCRIPT for message in (*said, reply)]


def get_exchanges():
    """The context and the reply of each request."""
    ends = [index for index, message in enumerate(MESSAGES) if message["role"] == "assistant"]
    return [([SYSTEM, *MESSAGES[:end]], MESSAGES[end]) for end in ends]


def write_claude_code(path):
    """A line per content block of a reply; each result hangs off the line of its call."""
    lines, parent, calls = [], None, {}

    def add(kind, message, follows):
        lines.append({"type": kind, "uuid": str(len(lines)), "parentUuid": follows, "message": message})
        return lines[-1]["uuid"]

    for number, message in enumerate(MESSAGES):
        role, blocks = to_anthropic(message)
        if role == "user":
            parent = add("user", {"role": role, "content": blocks}, calls.get(message.get("tool_call_id"), parent))
            continue
        for block in blocks:
            reply = {"id": f"msg_{number}", "role": role, "model": "m", "content": [block], "stop_reason": None}
            parent = add("assistant", reply, parent)
            calls[block.get("id")] = parent
        lines[-1]["message"]["stop_reason"] = "tool_use" if message.get("tool_calls") else "end_turn"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def write_codex(path):
    """A line per item of a request or a reply."""
    lines = [{"type": "session_meta", "payload": {"id": "s", "base_instructions": {"text": SYSTEM["content"]}}}]
    lines += [{"type": "response_item", "payload": item} for message in MESSAGES for item in to_items(message)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def write_swe_agent(path):
    """A step per reply, with what it was asked."""
    history = [to_history(message) for message in [SYSTEM, *MESSAGES]]
    replies = [index for index, item in enumerate(history) if item["role"] == "assistant"]
    steps = [{"query": history[:index], "response": history[index]["content"]} for index in replies]
    path.write_text(json.dumps({"trajectory": steps, "history": history}), "utf-8")


def to_history(message):
    """A message as an item of SWE-agent's history."""
    item = {"role": message["role"], "content": message.get("content") or "", "agent": "main"}
    if message["role"] == "tool":
        return {**item, "message_type": "observation", "tool_call_ids": [message["tool_call_id"]]}
    if message["role"] != "assistant":
        return {**item, "message_type": "observation"}
    blocks = [block for block in to_anthropic(message)[1] if block["type"] == "thinking"]
    calls = to_openai(message).get("tool_calls")
    return {**item, "message_type": "action", "action": "a", "tool_calls": calls, "thinking_blocks": blocks}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    ("source", "name", "write"),
    [
        ("claude-code", "session.jsonl", write_claude_code),
        ("codex", "rollout.jsonl", write_codex),
        ("swe-agent", "issue.traj", write_swe_agent),
    ],
)
def test_samples_are_the_requests_behind_a_transcript(tmp_path, source, name, write, template):
    write(tmp_path / name)
    (tmp_path / "system.txt").write_text(SYSTEM["content"])
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    given = ["--system_prompt", tmp_path / "system.txt", "--tools", tmp_path / "tools.json"]
    source = source if template == "qwen3" else "auto"
    examples = import_to(tmp_path / "data.jsonl", source, tmp_path / name, *given)
    assert_samples_are(examples, get_exchanges(), template)


@pytest.mark.parametrize("export", EXPORTS, ids=lambda export: export.__name__)
@pytest.mark.parametrize("is_named", [True, False], ids=["named", "recognised"])
def test_samples_are_the_requests_behind_an_export(tmp_path, export, is_named):
    exchanges = run_agent(OpenAIServer, tmp_path / "log.jsonl", echoes_reasoning=True)
    lines = map(json.loads, (tmp_path / "log.jsonl").read_text("utf-8").splitlines())
    exported = [export(line["request"], line["response"]) for line in lines]
    (tmp_path / "export.json").write_text(json.dumps(exported, indent=2))
    source = SOURCES[export] if is_named else "auto"
    examples = import_to(tmp_path / "data.jsonl", source, tmp_path / "export.json")
    assert_samples_are(examples, exchanges, "qwen3")


def log_vllm(prompt, completion):
    choice = {"token_ids": completion, "finish_reason": "stop", "stop_reason": None}
    return {"request": {"return_token_ids": True}, "response": {"prompt_token_ids": prompt, "choices": [choice]}}


def log_sglang(prompt, completion):
    info = {"finish_reason": {"type": "stop", "matched": completion[-1]}, "prompt_tokens": len(prompt)}
    return {"request": {"input_ids": prompt}, "response": {"output_ids": completion, "meta_info": info}}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(("source", "log"), [("vllm", log_vllm), ("sglang", log_sglang)])
def test_samples_are_the_tokens_that_a_server_read_and_wrote(tmp_path, source, log, template):
    tokenizer = make_tokenizer(template)
    expected = [served(tokenizer, *pair) for pair in get_exchanges()]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(log(*pair)) + "\n" for pair in expected))
    source = source if template == "qwen3" else "auto"
    import_to(tmp_path / "data.jsonl", source, tmp_path / "log.jsonl")
    gathered, _ = gather_turns(Dataset.from_json(str(tmp_path / "data.jsonl"), cache_dir=str(tmp_path)))
    samples = [sample for row in gathered for sample in tokenized_turns_to_samples(row["turns"])]
    assert [split(tokenizer, sample) for sample in samples] == expected


def split(tokenizer, sample):
    prompt, completion = sample.token_ids[: sample.prompt_length], sample.token_ids[sample.prompt_length :]
    newline = tokenizer("\n")["input_ids"][0]
    ended = completion[:-1] if completion[-1] == newline else completion
    return [prompt.tolist(), ended.tolist()]


def test_the_templates_differ_in_what_they_keep():
    first, reply = SCRIPT[0]
    messages = [*first, reply, {"role": "user", "content": "Next."}]
    kept = [make_tokenizer(name).apply_chat_template(messages, tokenize=False) for name in TEMPLATES]
    assert [reply["reasoning_content"] in text for text in kept] == [False, True]


def test_a_conversation_is_one_example_with_requests_of_their_own_context_if_reasoning_is_not_echoed(
    imported, echoes_reasoning
):
    _, (example,) = imported
    if echoes_reasoning:
        assert sorted(example) == ["messages", "tools"]
    else:  # the first reply is echoed without its reasoning, so that each later request has a context of its own
        assert sorted(example) == ["requests", "tools"]
        assert len(example["requests"]) == len(SCRIPT)
