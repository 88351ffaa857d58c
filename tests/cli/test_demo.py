"""The tiny model and its conversations, written from the installed package."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_singlepass import render_samples
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


def test_the_model_is_the_same_every_time(run, tmp_path):
    for name in ("first", "second"):
        run("demo-model", tmp_path / name)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
