"""Recipes and the demo are written as they are in the repository."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_singlepass import render_samples
from trl_singlepass.cli import file_commands
from trl_singlepass.cli.demo import DATA
from trl_singlepass.data.files import load_examples


FOLDER = Path(__file__).parents[2] / "recipes"


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "README.md"
    }


def test_every_recipe_is_listed_with_what_it_is_for(run):
    code, out, _ = run("recipes")
    assert code == 0
    listed = dict(re.fullmatch(r"(\S+) *(.*)", line).groups() for line in out.splitlines())
    assert len(listed) == len(files(FOLDER))
    assert all(listed[path.stem] for path in FOLDER.glob("*.yaml"))
    assert out.startswith("cpu-smoke ")


@pytest.mark.parametrize(
    "name", ["cpu-smoke", "cpu-smoke.yaml", "accelerate/fsdp2", "deepspeed/zero3.json", "slurm/train.sh"]
)
def test_a_recipe_is_printed_as_it_is(run, name):
    path = FOLDER / name if (FOLDER / name).exists() else FOLDER / f"{name}.yaml"
    assert run("recipes", name)[:2] == (0, path.read_text())


def test_all_are_written(run, tmp_path):
    assert run("recipes", "-o", tmp_path / "recipes")[0] == 0
    assert files(tmp_path / "recipes") == files(FOLDER)


def test_a_changed_file_stops_it_before_anything_is_written(run, tmp_path):
    (tmp_path / "cpu-smoke.yaml").write_text("mine: true\n")
    code, _, err = run("recipes", "-o", tmp_path)
    assert code == 2
    assert "cpu-smoke.yaml would be overwritten" in err
    assert files(tmp_path) == {"cpu-smoke.yaml": b"mine: true\n"}


def test_files_that_are_the_same_stay(tmp_path):
    file_commands.write_recipes(str(tmp_path))
    assert file_commands.write_recipes(str(tmp_path)).startswith("Wrote 0 files")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "There is no recipe 'none', only cpu-smoke, "),
        (["../pyproject.toml"], "There is no recipe"),
        (["cpu-smoke", "-o", "x"], "not both"),
    ],
)
def test_errors(run, arguments, message):
    code, out, err = run("recipes", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_every_recipe_says_what_it_is_for():
    assert not [line for line in file_commands.list_recipes().splitlines() if len(line.split()) < 3]


# The demo's model, conversations, pairs and logs ---------------------------------------------------------------------


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
    assert run("demo-data", file, "--pairs")[:2] == (0, f"Wrote 240 preference pairs to {file}\n")
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
