"""The demo's data is what its generator writes, its template behaves like Qwen3's, and it runs end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

from demo import make_data
from demo.load import load_rows, load_tokenizer
from demo.npass import _parts_of_similar_length


REPOSITORY = Path(__file__).parents[2]
QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
ROWS = load_rows(None, 24)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(None)


def test_data_is_what_its_generator_writes(tmp_path, monkeypatch):
    shipped = make_data.DATA.read_bytes()
    monkeypatch.setattr(make_data, "DATA", tmp_path / "conversations.jsonl")
    make_data.main()
    assert make_data.DATA.read_bytes() == shipped


def without_tool_list(text):
    """Return the text without the tool list, which the demo words in its own way; the rest equals Qwen3's exactly."""
    head, separator, rest = text.partition("</tools>")
    return rest.partition("<|im_end|>")[2] if separator else head


def rendered(tokenizer, messages, template, **kwargs):
    text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **kwargs)
    return without_tool_list(text)


PARALLEL_CALLS = {
    "messages": [
        {"role": "user", "content": "Both prices?"},
        {
            "role": "assistant",
            "content": "Looking up.",
            "reasoning_content": "Two calls.",
            "tool_calls": [
                {"type": "function", "function": {"name": "lookup", "arguments": {"key": key}}} for key in "ab"
            ],
        },
        {"role": "tool", "name": "lookup", "content": "1"},
        {"role": "tool", "name": "lookup", "content": "2"},
        {"role": "assistant", "content": "<think>\nSum.\n</think>\n\n1 and 2."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "Welcome."},
    ],
    "tools": make_data.TOOLS,
}


@pytest.mark.parametrize("row", [*ROWS[:8], PARALLEL_CALLS], ids=lambda row: row["messages"][0]["content"][:20])
def test_template_shows_history_as_qwen3_does(tokenizer, row):
    for end in range(1, len(row["messages"]) + 1):
        messages = row["messages"][:end]
        for options in (
            {},
            {"add_generation_prompt": True},
            {"add_generation_prompt": True, "enable_thinking": False},
        ):
            ours = rendered(tokenizer, messages, None, tools=row.get("tools"), **options)
            assert ours == rendered(tokenizer, messages, QWEN3, tools=row.get("tools"), **options)


def test_npass_forwards_hold_every_sample_without_wasted_padding(monkeypatch):
    monkeypatch.setattr("demo.npass.MAX_TOKENS_PER_FORWARD", 8)
    lengths = torch.tensor([2, 7, 4, 3])
    mask = (torch.arange(7) < lengths[:, None]).long()
    parts = list(_parts_of_similar_length({"attention_mask": mask, "input_ids": mask * lengths[:, None]}))
    assert [part["input_ids"][:, 0].tolist() for part in parts] == [[7], [4, 3], [2]]
    assert [part["attention_mask"].shape[1] for part in parts] == [7, 4, 2]


@pytest.mark.slow
def test_demo_runs_with_the_users_own_model_and_data(tmp_path, tokenizer):
    """End to end, for two steps, as `make demo MODEL=… DATA=…` does."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    Dataset.from_list(ROWS[:4]).to_parquet(tmp_path / "rows.parquet")
    output = tmp_path / "out"
    command = [sys.executable, "-m", "demo", "--model", tmp_path / "model", "--data", tmp_path / "rows.parquet"]
    command += ["--conversations-per-step", "2", "--output", output]
    done = subprocess.run([*map(str, command)], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("sharing factor", "predicted speed-up", "measured speed-up", "peak memory", "equal"):
        assert expected in done.stdout
    assert "NOT EQUAL" not in done.stdout
    npass, single_pass = (json.loads((output / f"{mode}.json").read_text()) for mode in ("npass", "single_pass"))
    assert len(npass["losses"]) == 2
    assert npass["losses"] == pytest.approx(single_pass["losses"], rel=1e-5)
    assert all((output / name).stat().st_size > 10_000 for name in ("loss.png", "tree.png", "mask.png"))
