"""The DPO script: TRL's commands, pairs with tools in a file, and a run that goes on after a signal."""

import json
import re
import shlex
from pathlib import Path

import pytest
from trl.scripts import dpo as stock_script

from support.chat_tokenizers import make_tokenizer
from trl_singlepass import SinglePassDPOTrainer
from trl_singlepass.data.pairs import example_to_pair
from trl_singlepass.data.settings import PairSettings
from trl_singlepass.scripts import dpo


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")

COMMANDS = re.findall(r"^python trl/scripts/dpo\.py(.*?)^```", stock_script.__doc__, re.M | re.S)
TRAIN = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "1", "--save_strategy", "no"]


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


@pytest.mark.slow
def test_a_changed_checkpoint_is_not_resumed(model, pairs, tmp_path):
    out = tmp_path / "out"
    given = ["--model_name_or_path", model, "--dataset_name", pairs, "--output_dir", out, *TRAIN]
    train(*given, "--save_strategy", "steps", "--save_steps", 1)
    weights = out / "checkpoint-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(ValueError, match=r"checkpoint-1 cannot be resumed: model\.safetensors"):
        train(*given, "--max_steps", 2, "--resume_from_checkpoint", out / "checkpoint-1")
