"""The DPO script: TRL's commands, pairs with tools in a file, and a run that goes on after a signal."""

import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl.scripts import dpo as stock_script

from support.chat_tokenizers import make_tokenizer
from support.conversations import TOOLS, chat, tool_chat
from support.pairs import pair
from trl_singlepass import SinglePassDPOTrainer
from trl_singlepass.data.pairs import example_to_pair
from trl_singlepass.data.settings import PairSettings
from trl_singlepass.scripts import dpo


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")

COMMANDS = re.findall(r"^python trl/scripts/dpo\.py(.*?)^```", stock_script.__doc__, re.M | re.S)
TRAIN = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "1", "--save_strategy", "no"]


def tool_pair():
    """Return a pair of which one side calls a tool, with arguments as an object, and the other does not."""
    called = tool_chat()
    return {"prompt": called[:1], "chosen": called[1:], "rejected": chat(1, 7)[1:], "tools": TOOLS}


@pytest.fixture
def pairs(tmp_path):
    rows = [pair(2, 0), pair(2, 1, rejected_turns=1), tool_pair(), pair(1, 3)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def train(*arguments):
    given = [str(argument) for argument in arguments]
    dpo.main(*dpo.make_parser().parse_args_and_config([*given, "--dtype", "float32"], fail_with_unknown_args=False))


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that have trained."""
    trained, original = [], SinglePassDPOTrainer.train

    def remember(self, *args, **kwargs):
        trained.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SinglePassDPOTrainer, "train", remember)
    return trained


def test_script_trains_on_a_file_and_writes_a_card(model, pairs, trainers, tmp_path):
    out = tmp_path / "out"
    train("--model_name_or_path", model, "--dataset_name", pairs, "--output_dir", out, *TRAIN)
    assert (out / "model.safetensors").is_file()
    (trainer,) = trainers
    tokenizer = make_tokenizer()
    for row, line in zip(trainer.train_dataset, pairs.read_text().splitlines(), strict=True):
        rendered = example_to_pair(json.loads(line), 0, tokenizer, PairSettings())
        assert sum(row["multiplicity"]) == sum(map(len, rendered.samples))
    card = (out / "README.md").read_text()
    assert "None" not in card
    assert "- Data: 13 turns of 4 pairs; " in card
    assert f"- Trained tokens: {trainer.state.log_history[-1]['num_trained_tokens']:.10g}\n" in card
    assert "https://huggingface.co/papers/2305.18290" in card


def test_the_docstring_still_shows_two_commands():
    assert len(COMMANDS) == 2


@pytest.mark.parametrize(
    "command",
    [pytest.param(COMMANDS[0], marks=pytest.mark.slow, id="full training"), pytest.param(COMMANDS[1], id="LoRA")],
)
def test_commands_of_trls_docstring_train(model, pairs, trainers, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        Path("data").mkdir(exist_ok=True)
        Path("data", f"{split}.jsonl").write_text(pairs.read_text())
    here = ["--model_name_or_path", model, "--dataset_name", "data", *TRAIN, "--max_steps", "2", "--eval_steps", "2"]
    train(*shlex.split(command.replace("\\\n", " ")), *here)
    (trainer,) = trainers
    assert trainer.state.global_step == 2
    assert any("eval_rewards/margins" in entry for entry in trainer.state.log_history)
    assert Path("Qwen2-0.5B-DPO").is_dir()
    assert ("--use_peft" in command) == hasattr(trainer.model, "peft_config")


class ToldToStop(TrainerCallback):
    """A scheduler's signal in the second step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_script_saves_when_told_to_stop_and_goes_on_from_there(model, pairs, trainers, tmp_path, monkeypatch):
    more = ["--max_steps", 4, "--logging_steps", 1, "--save_strategy", "steps", "--save_steps", 100]

    def run(output, *arguments):
        given = ["--model_name_or_path", model, "--dataset_name", pairs, "--output_dir", output]
        train(*given, *TRAIN, *more, *arguments)

    def stopped(callbacks, **kwargs):
        return SinglePassDPOTrainer(callbacks=[*callbacks, ToldToStop()], **kwargs)

    run(tmp_path / "whole", "--resume_from_checkpoint", "auto")  # nothing there yet
    monkeypatch.setattr(dpo, "SinglePassDPOTrainer", stopped)
    run(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != "README.md"] == ["checkpoint-2"]
    assert (tmp_path / "out" / "checkpoint-2" / "manifest" / "ranks.json").is_file()
    monkeypatch.undo()
    run(tmp_path / "out", "--resume_from_checkpoint", "auto")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    state = [
        json.loads((tmp_path / name / "checkpoint-4" / "trainer_state.json").read_text()) for name in ("whole", "out")
    ]
    for key in ("num_trained_tokens", "num_tokens", "loss"):
        logged = [[entry[key] for entry in each["log_history"] if key in entry] for each in state]
        assert logged[0] == logged[1]


@pytest.mark.slow
def test_a_changed_checkpoint_is_not_resumed(model, pairs, tmp_path):
    out = tmp_path / "out"
    given = ["--model_name_or_path", model, "--dataset_name", pairs, "--output_dir", out, *TRAIN]
    train(*given, "--save_strategy", "steps", "--save_steps", 1)
    weights = out / "checkpoint-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(ValueError, match=r"checkpoint-1 cannot be resumed: model\.safetensors"):
        train(*given, "--max_steps", 2, "--resume_from_checkpoint", out / "checkpoint-1")


@pytest.mark.parametrize(
    ("setting", "buffers"), [("true", {"flag"}), ("false", None)], ids=["ignored", "synchronised"]
)
def test_boolean_buffers_are_ignored_as_trls_script_does(model, pairs, tmp_path, monkeypatch, setting, buffers):
    seen = []

    class WithBuffer(SinglePassDPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model.register_buffer("flag", torch.tensor(True))

        def train(self, **kwargs):
            seen.append(getattr(self.model, "_ddp_params_and_buffers_to_ignore", None))
            raise KeyboardInterrupt

    monkeypatch.setattr(dpo, "SinglePassDPOTrainer", WithBuffer)
    given = ["--model_name_or_path", model, "--dataset_name", pairs, "--output_dir", tmp_path / "out", *TRAIN]
    with pytest.raises(KeyboardInterrupt):
        train(*given, "--ignore_bias_buffers", setting)
    assert seen == [None if buffers is None else list(buffers)]
