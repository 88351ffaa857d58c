"""The tiny model and its conversations, written from the installed package."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_singlepass import render_samples
from trl_singlepass.cli.demo import DATA
from trl_singlepass.data.files import load_examples


def test_model_and_data_go_together(run, tmp_path):
    code, out, _ = run("demo-model", tmp_path / "model")
    assert code == 0
    assert out.endswith(f"Wrote a Qwen3 with 1.9 million random weights to {tmp_path / 'model'}\n")
    file = tmp_path / "new" / "data.jsonl"
    assert run("demo-data", file)[:2] == (0, f"Wrote 240 conversations to {file}\n")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    example = load_examples(str(file))[0]
    assert example == json.loads(file.read_text().splitlines()[0])
    samples = render_samples(example["messages"], tokenizer, tools=example["tools"])
    assert torch.isfinite(model(torch.tensor([samples[0].token_ids.tolist()])).logits).all()


def test_pairs_prefer_a_conversation_to_one_with_other_answers(run, tmp_path):
    file = tmp_path / "new" / "pairs.jsonl"
    assert run("demo-data", file, "--pairs") == (0, f"Wrote 240 preference pairs to {file}\n", "")
    pairs, conversations = (list(map(json.loads, path.read_text().splitlines())) for path in (file, DATA))
    for pair, conversation in zip(pairs, conversations, strict=True):
        assert pair["prompt"] + pair["chosen"] == conversation["messages"]
        assert pair.get("tools") == conversation.get("tools")
        assert [message["role"] for message in pair["rejected"]] == [message["role"] for message in pair["chosen"]]
        changed = [a for a, b in zip(pair["chosen"], pair["rejected"], strict=True) if a != b]
        assert changed
        assert all(message["role"] == "assistant" and "tool_calls" not in message for message in changed)


def test_logs_are_written_for_an_import(run, tmp_path):
    code, out, _ = run("demo-data", tmp_path / "logs", "--logs")
    assert (code, out.count(".json")) == (0, 3)
    for name in ("chat_completions.jsonl", "claude_code.jsonl"):
        arguments = [
            "-o",
            tmp_path / "data.jsonl",
            "--tools",
            tmp_path / "logs" / "bash_tool.json",
            "--bad_lines=drop",
        ]
        assert run("import", "auto", tmp_path / "logs" / name, *arguments)[0] == 0
    assert run("demo-data", tmp_path / "data", "--logs", "--pairs")[0] == 2


def test_the_model_is_the_same_every_time(run, tmp_path):
    for name in ("first", "second"):
        run("demo-model", tmp_path / name)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
