"""What both scripts do alike: a run that goes on after a signal, and buffers that DDP cannot synchronise."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_singlepass.scripts import dpo, sft


TRAIN = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--dtype", "float32"]
SCRIPTS = pytest.mark.parametrize(
    ("script", "trainer", "file"),
    [(sft, "SinglePassSFTTrainer", "data"), (dpo, "SinglePassDPOTrainer", "pairs")],
    ids=["sft", "dpo"],
)


def train(script, *arguments):
    given = [*map(str, arguments), *TRAIN]
    script.main(*script.make_parser().parse_args_and_config(given, fail_with_unknown_args=False))


class ToldToStop(TrainerCallback):
    """A scheduler's signal in the second step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@SCRIPTS
def test_a_run_saves_when_told_to_stop_and_goes_on_from_there(
    model, script, trainer, file, tmp_path, monkeypatch, capsys, request
):
    more = ["--max_steps", 4, "--logging_steps", 1, "--save_strategy", "steps", "--save_steps", 100]
    given = ["--model_name_or_path", model, "--dataset_name", request.getfixturevalue(file), *more]
    trainer = getattr(script, trainer)
    original = trainer.__init__
    train(script, *given, "--output_dir", tmp_path / "whole", "--resume_from_checkpoint", "auto")  # nothing there yet
    with monkeypatch.context() as patch:
        patch.setattr(
            trainer,
            "__init__",
            lambda self, callbacks, **kwargs: original(self, callbacks=[*callbacks, ToldToStop()], **kwargs),
        )
        train(script, *given, "--output_dir", tmp_path / "out")
    assert "--resume_from_checkpoint auto" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != "README.md"] == ["checkpoint-2"]
    assert (tmp_path / "out" / "checkpoint-2" / "manifest" / "ranks.json").is_file()
    train(script, *given, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "auto")
    assert str(tmp_path / "out" / "checkpoint-2") in capsys.readouterr().out
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    states = [
        json.loads((tmp_path / name / "checkpoint-4" / "trainer_state.json").read_text()) for name in ("whole", "out")
    ]
    for key in ("step", "num_trained_tokens", "num_tokens", "loss"):
        logged = [[entry[key] for entry in each["log_history"] if key in entry] for each in states]
        assert logged[0] == logged[1]


@SCRIPTS
@pytest.mark.parametrize(("setting", "ignored"), [("true", ["flag"]), ("false", None)])
def test_boolean_buffers_are_ignored_as_trls_script_does(
    model, script, trainer, file, tmp_path, monkeypatch, request, setting, ignored
):
    seen = []
    trainer = getattr(script, trainer)
    original = trainer.__init__

    def with_buffer(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.model.register_buffer("flag", torch.tensor(True))

    def stop(self, **kwargs):
        seen.append(getattr(self.model, "_ddp_params_and_buffers_to_ignore", None))
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "__init__", with_buffer)
    monkeypatch.setattr(trainer, "train", stop)
    given = ["--model_name_or_path", model, "--dataset_name", request.getfixturevalue(file), "--max_steps", 1]
    with pytest.raises(KeyboardInterrupt):
        train(script, *given, "--output_dir", tmp_path / "out", "--ignore_bias_buffers", setting)
    assert seen == [ignored]
