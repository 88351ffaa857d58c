"""The process that `train` starts: few lines for errors that users can act on, a traceback for others."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, IterableDataset
from transformers.utils import is_torch_bf16_gpu_available

from trl_singlepass.cli import worker
from trl_singlepass.cli.arguments import EXPLAINED, INTERRUPTED
from trl_singlepass.data.bad_rows import BadRowError
from trl_singlepass.scripts import dpo, run, sft
from trl_singlepass.training import compatibility, situation


@pytest.fixture(autouse=True)
def arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["worker", "train", "--output_dir", "x", "--use_cpu", "--bf16", "false"])
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def fail_with(monkeypatch):
    """Make the script raise an error."""

    def fail_with(error):
        def main(*args):
            raise error

        monkeypatch.setattr(sft, "main", main)

    return fail_with


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("No data:\ngive some"), "trl-singlepass train: No data: give some.\n"),
        (FileNotFoundError("none.json"), "trl-singlepass train: FileNotFoundError: none.json.\n"),
        (ImportError("peft is missing."), "trl-singlepass train: ImportError: peft is missing.\n"),
    ],
)
def test_errors_are_one_line(fail_with, capsys, error, line):
    fail_with(error)
    assert worker.run() == EXPLAINED
    assert capsys.readouterr().err == line


def test_the_script_is_that_of_the_command(monkeypatch, capsys):
    def main(script_args, training_args, *others):
        raise ValueError(f"beta={training_args.beta}")

    monkeypatch.setattr(dpo, "main", main)
    monkeypatch.setattr(sys, "argv", ["worker", "dpo", "--output_dir", "x", "--use_cpu", "--bf16", "false"])
    assert worker.run() == EXPLAINED
    assert capsys.readouterr().err == "trl-singlepass dpo: --beta 0.1.\n"


def test_crashes_keep_their_traceback(fail_with):
    fail_with(RuntimeError("CUDA error"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        worker.run()


def test_rank_0_speaks_first(fail_with, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(worker.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    fail_with(ValueError("no"))
    assert worker.run() == EXPLAINED
    assert waited == [worker._HEAD_START]
    assert capsys.readouterr().err == "trl-singlepass train (rank 3): no.\n"


def test_nothing_imports_the_worker_before_it_runs():
    """Python would warn in every run."""
    code = "import sys, trl_singlepass.cli; sys.exit('trl_singlepass.cli.worker' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_a_run_that_ends_well_has_exit_code_0(monkeypatch):
    monkeypatch.setattr(sft, "main", lambda *args: None)
    assert worker.run() == 0


def test_ctrl_c_is_quiet_whatever_it_breaks(monkeypatch, capsys):
    def main(*args):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)  # the launcher passes it on
            raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(sft, "main", main)
    assert worker.run() == INTERRUPTED
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_ends_processes_that_prepare_data(monkeypatch):
    def main(*args):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == INTERRUPTED

    monkeypatch.setattr(sft, "main", main)
    assert worker.run() == 0


BAD = [
    *[{"messages": [{"role": "user", "content": "Hi"}]}] * 5,
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes.", "weight": -1.0}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "oracle", "content": "No."}]},
    {"messages": [{"role": "user"}, {"role": "assistant", "content": "Yes."}]},
]
GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def train(monkeypatch, capsys, *arguments):
    """Run the worker on arguments of a short run; return its exit code and the lines of its error."""
    short = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["worker", "train", *short, *map(str, arguments)])
    code = worker.run()
    *_, error = capsys.readouterr().err.rpartition("trl-singlepass train: ")
    return code, error.splitlines()


def test_all_reasons_have_a_line_and_the_way_out_a_flag(model, monkeypatch, capsys, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [GOOD, *BAD])
    arguments = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", tmp_path / "out"]
    code, lines = train(monkeypatch, capsys, *arguments)
    assert code == EXPLAINED
    assert [index for line in lines for index in "68" if f"Row {index}:" in line] == ["6", "8"]
    assert sum("1, 2, 3, 4, 5, 7" in line for line in lines) == 1
    assert "--bad_rows drop" in lines[-1]
    assert "weight=-1.0" in "".join(lines)  # no flag


def test_a_model_without_a_chat_template_is_told_where_to_give_one(model, monkeypatch, capsys, tmp_path):
    data, bare = write_rows(tmp_path / "rows.jsonl", [GOOD] * 8), tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "chat_template.jinja").unlink()
    arguments = ["--model_name_or_path", bare, "--dataset_name", data, "--output_dir", tmp_path / "out"]
    code, (line,) = train(monkeypatch, capsys, *arguments)
    assert code == EXPLAINED
    assert "--chat_template_path" in line
    assert "bad_rows" not in line


def test_the_error_of_a_worker_of_a_stream_comes_without_its_traceback(fail_with, model, capsys):
    class Stream(IterableDataset):
        def __iter__(self):
            raise BadRowError("Row 3: no.\nbad_rows='drop' helps")

    with pytest.raises(BadRowError) as caught:
        list(DataLoader(Stream(), num_workers=1))
    fail_with(caught.value)
    assert worker.run() == EXPLAINED
    assert capsys.readouterr().err == "trl-singlepass train: Row 3: no.\n--bad_rows drop helps.\n"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("set use_cpu=True, or save_strategy='no'.", "set --use_cpu true, or --save_strategy no."),
        ("learning_rate=1e-5, not warmup_steps=0.1.", "--learning_rate 1e-5, not --warmup_steps 0.1."),
        ("from_pretrained(m, mistral_format=False)", "from_pretrained(m, mistral_format=False)."),
        ("resume_from_checkpoint=last(x), max_length=None", "resume_from_checkpoint=last(x), max_length=None."),
    ],
)
def test_settings_are_spelt_as_they_are_typed(fail_with, capsys, said, shown):
    fail_with(ValueError(said))
    worker.run()
    assert capsys.readouterr().err == f"trl-singlepass train: {shown}\n"


def test_errors_before_a_process_starts_spell_settings_so_too(run):
    code, _, err = run("train", "--output_dir", "x", "--use_cpu", "--bf16", "false", "--max_length", "1")
    assert code == EXPLAINED
    assert "--max_length 1" in err


NOTHING = [
    ("--chat_template_path", "{tmp}/nope.jinja"),
    ("--chat_template_path", "nope.jinja"),
    ("--chat_template_path", "no-such/model"),
    ("--chat_template_path", "{tmp}/file"),
    ("--attn_implementation", "flash_attention_2"),
    ("--attn_implementation", "flash_attention_3"),
    ("--output_dir", "{tmp}/file/out"),
    ("--output_dir", "{tmp}/file"),
]


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [("train", *given) for given in NOTHING] + [("dpo", *given) for given in NOTHING[4:]],
)
def test_names_of_nothing_are_told_with_their_flag_before_data_is_read(
    monkeypatch, capsys, tmp_path, command, flag, value
):
    (tmp_path / "file").write_text("no template")
    monkeypatch.setattr(run, "load_splits", lambda *_: pytest.fail("data was read"))
    monkeypatch.setattr(situation, "is_kernels_available", lambda: False)
    monkeypatch.setattr(compatibility, "is_offline_mode", lambda: True)
    given = {"--output_dir": "x", "--model_name_or_path": "m", flag: value.format(tmp=tmp_path)}
    words = [word for pair in given.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["worker", command, *words, "--use_cpu", "--bf16", "false"])
    assert worker.run() == EXPLAINED
    assert f"{flag} {given[flag]}" in capsys.readouterr().err


@pytest.mark.skipif(is_torch_bf16_gpu_available(), reason="bf16 is fine here")
@pytest.mark.parametrize("command", ["train", "dpo"])
def test_bf16_without_a_gpu_names_its_flag(run, command):
    code, _, err = run(command, "--output_dir", "x")
    assert code == EXPLAINED
    assert "--bf16 false" in err
    assert "--use_cpu true" in err


@pytest.mark.parametrize("content", ["", '{"epoch": 1.0, "glob', "{epoch: 1}"])
def test_a_corrupt_state_is_named_before_data_is_read(monkeypatch, capsys, tmp_path, content):
    monkeypatch.setattr(run, "load_splits", lambda *_: pytest.fail("data was read"))
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(content)
    arguments = ["--model_name_or_path", "m", "--output_dir", tmp_path, "--resume_from_checkpoint", checkpoint]
    code, (line,) = train(monkeypatch, capsys, *arguments)
    assert code == EXPLAINED
    assert str(checkpoint) in line
    assert "trainer_state.json" in line
    assert "--resume_from_checkpoint auto" in line


def test_another_error_about_bf16_stays_as_it_is(run):
    code, _, err = run("train", "--output_dir", "x", "--use_cpu", "true", "--bf16", "true", "--fp16", "true")
    assert code == EXPLAINED
    assert "fp16" in err
    assert "--bf16 false" not in err
