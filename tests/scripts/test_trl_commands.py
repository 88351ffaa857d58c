"""The commands in the docstrings of TRL's scripts, as our scripts and TRL's own with our classes take them."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from transformers import Trainer
from trl.scripts import dpo as stock_dpo
from trl.scripts import grpo as stock_grpo
from trl.scripts import rloo as stock_rloo
from trl.scripts import sft as stock_script

from support.conversations import chat
from support.slow import slow_but_for
from support.small_files import write_model
from support.trainers import as_dataset, logged
from trl_singlepass import SinglePassSFTTrainer
from trl_singlepass.scripts import dpo, grpo, rloo
from trl_singlepass.scripts import sft as our_script


PAIRS = [(our_script, stock_script), (dpo, stock_dpo), (grpo, stock_grpo), (rloo, stock_rloo)]
COMMANDS = {
    name: re.findall(rf"^python trl/scripts/{name}\.py(.*?)^```", script.__doc__, re.M | re.S)
    for name, script in (("sft", stock_script), ("dpo", stock_dpo))
}
# What a machine without GPU and network needs besides.
HERE = ["--bf16", "false", "--use_cpu", "--max_steps", "2", "--report_to", "none", "--logging_steps", "1"]


def example_script():
    path = Path(__file__).parents[2] / "examples" / "sft.py"
    spec = importlib.util.spec_from_file_location("examples_sft", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(tmp_path, tokenizer, monkeypatch):
    """A model and a dataset under the names of the docstring, in folders; nothing is pushed anywhere."""
    monkeypatch.chdir(tmp_path)
    write_model("Qwen/Qwen2-0.5B", tokenizer)
    for split in ("train", "test"):
        rows = as_dataset([chat(2, seed=seed) for seed in range(6)])
        rows.to_parquet(f"trl-lib/Capybara/{split}.parquet")
    pushed = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, *_: None)
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr(SinglePassSFTTrainer, "push_to_hub", lambda self, **kwargs: pushed.append(kwargs))
    monkeypatch.setattr(SinglePassSFTTrainer, "hub_model_id", "none", raising=False)
    return pushed


@pytest.mark.parametrize("name", COMMANDS)
def test_the_docstring_still_shows_two_commands(name):
    assert ["--use_peft" in command for command in COMMANDS[name]] == [False, True]


@pytest.mark.parametrize(("ours", "stock"), PAIRS, ids=["sft", "dpo", "grpo", "rloo"])
def test_every_flag_of_trl_is_written_as_in_trl(ours, stock):
    """Bare flags, those with a value and those with several."""
    parsers = ours.make_parser(), stock.make_parser()
    written, expected = (
        {flag: (action.nargs, action.const) for action in parser._actions for flag in action.option_strings}
        for parser in parsers
    )
    assert {flag: written.get(flag) for flag in expected} == expected


def test_settings_that_ask_for_what_happens_anyway_are_bare_flags(tmp_path):
    out = ["--output_dir", str(tmp_path), "--dataset_name", "data", "--bf16", "false"]
    sft_args, dpo_args = (
        script.make_parser().parse_args_and_config([*out, *flags])[1]
        for script, flags in ((our_script, ["--assistant_only_loss"]), (dpo, ["--packing"]))
    )
    assert sft_args.assistant_only_loss is True
    assert dpo_args.packing is True
    assert our_script.make_parser().parse_args_and_config(out)[1].assistant_only_loss is None


@pytest.mark.parametrize("command", COMMANDS["sft"], ids=["full training", "LoRA"])
@pytest.mark.parametrize("script", [our_script, example_script()], ids=["ours", "TRL's with our classes"])
def test_commands_of_trls_docstring_train(hub, trained, script, command):
    arguments = [*shlex.split(command.replace("\\\n", " ")), *HERE]
    script.main(*script.make_parser().parse_args_and_config(arguments, fail_with_unknown_args=False))
    (trainer,) = trained
    assert trainer.state.global_step == 2
    assert logged(trainer, "num_trained_tokens")
    assert trainer.args.packing
    assert trainer.processing_class.eos_token == "<|im_end|>"
    assert Path("Qwen2-0.5B-SFT").is_dir()
    assert hub[-1] == {"dataset_name": "trl-lib/Capybara"}
    assert ("--use_peft" in command) == hasattr(trainer.model, "peft_config")


@pytest.mark.parametrize("command", slow_but_for(COMMANDS["dpo"][1:], COMMANDS["dpo"]), ids=["full training", "LoRA"])
def test_commands_of_trls_docstring_train_on_pairs(model, pairs, trained, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for split in ("train", "test"):
        Path("data", f"{split}.jsonl").write_text(pairs.read_text())
    here = ["--model_name_or_path", model, "--dataset_name", "data", "--save_strategy", "no", "--dtype", "float32"]
    arguments = [
        *shlex.split(command.replace("\\\n", " ")),
        *HERE,
        *here,
        "--eval_steps",
        "2",
        "--logging_steps",
        "25",
    ]
    dpo.main(*dpo.make_parser().parse_args_and_config(arguments, fail_with_unknown_args=False))
    (trainer,) = trained
    assert trainer.state.global_step == 2
    assert logged(trainer, "eval_rewards/margins")
    assert Path("Qwen2-0.5B-DPO").is_dir()
    assert ("--use_peft" in command) == hasattr(trainer.model, "peft_config")
