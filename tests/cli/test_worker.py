"""The process that `train` starts: one line for errors that users can act on, a traceback for others."""

import os
import signal
import sys

import pytest

from trl_singlepass.cli import worker
from trl_singlepass.cli.errors import EXPLAINED, INTERRUPTED
from trl_singlepass.scripts import dpo, sft


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")


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
    assert capsys.readouterr().err == "trl-singlepass dpo: beta=0.1.\n"


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
