"""`train`: what goes to the script and what to accelerate, signals, and errors of the processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from accelerate.commands.launch import _validate_launch_command
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from support.slow import slow_but_for
from support.trainers import own_settings
from trl_singlepass import SinglePassDPOConfig, SinglePassGRPOConfig, SinglePassRLOOConfig, SinglePassSFTConfig
from trl_singlepass.cli import launch
from trl_singlepass.cli.arguments import INTERRUPTED
from trl_singlepass.cli.main import main
from trl_singlepass.scripts import sft


TRAIN = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "1", "--save_strategy", "no"]


def failed_child(exit_code):
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=exit_code, error_file="none")
    return ChildFailedError("worker", {0: failure})


def raising(error):
    def fail(args):
        raise error

    return fail


def test_train_launches_the_script_through_accelerate(monkeypatch, tmp_path):
    launched = []
    monkeypatch.setattr(launch, "launch_command", launched.append)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    (tmp_path / "c.yaml").write_text("num_processes: 2\nlearning_rate: 1.0e-3\n")
    for name in ("train", "sft"):
        arguments = [name, "--config", tmp_path / "c.yaml", "--dataset_name", "d", "--accelerate_config", "fsdp2"]
        assert main([str(a) for a in [*arguments, "--main_process_port", 1234, "--output_dir", tmp_path, *TRAIN]]) == 0
    for args in launched:
        assert args.module
        assert args.training_script == launch.WORKER
        assert args.config_file.endswith("fsdp2.yaml")
        assert (args.num_processes, args.main_process_port) == (2, 1234)
        assert args.training_script_args[:4] == ["train", "--config", str(tmp_path / "c.yaml"), "--dataset_name"]
        assert "--main_process_port" not in args.training_script_args


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("train", SinglePassSFTConfig),
        ("dpo", SinglePassDPOConfig),
        ("grpo", SinglePassGRPOConfig),
        ("rloo", SinglePassRLOOConfig),
    ],
)
def test_help_names_the_settings_that_the_config_adds_or_changes(run, command, config):
    code, out, _ = run(command, "--help")
    assert code == 0
    flags = re.findall(r"^  --(\w+)", out, re.M)
    assert flags[-len(own_settings(config)) :] == own_settings(config)
    assert {"model_name_or_path", "accelerate_config", "config"} <= set(flags)


PATIENT = """
import os, pathlib, signal, sys, time
from trl_singlepass.cli import worker
from trl_singlepass.scripts import sft

def wait(*args):
    folder = pathlib.Path(sys.argv[-1])
    rank = os.environ.get("RANK", "0")
    stopped = folder / f"stopped{rank}"
    signal.signal(signal.SIGTERM, lambda *_: stopped.touch())
    (folder / f"ready{rank}").touch()
    while not stopped.exists():
        time.sleep(0.05)

sft.main = wait
raise SystemExit(worker.run())
"""


@pytest.fixture
def train_patiently(tmp_path):
    """Start `train` with processes that wait for a signal, send them one, and return exit code and errors."""

    def train_patiently(num_processes, send):
        (tmp_path / "patient.py").write_text(PATIENT)
        # A shell that starts the tests in the background has Ctrl-C ignored in all that they start.
        code = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from trl_singlepass.cli import launch, main; launch.WORKER = 'patient'; raise SystemExit(main())"
        )
        path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
        processes = ["--num_processes", str(num_processes), *(["--multi_gpu"] if num_processes > 1 else [])]
        command = [sys.executable, "-W", "ignore", "-c", code, "train", *processes, *TRAIN, "--output_dir", tmp_path]
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        run = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 300
            while len(list(tmp_path.glob("ready*"))) < num_processes:
                assert run.poll() is None, run.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            send(run.pid)
            _, errors = run.communicate(timeout=180)
        finally:
            for process in [*psutil.Process(run.pid).children(recursive=True), run] if run.poll() is None else []:
                process.kill()
            run.communicate()
        return run.returncode, errors

    return train_patiently


@pytest.mark.parametrize("num_processes", slow_but_for([1], [1, 2]))
def test_train_hands_on_that_it_should_stop_and_ends_well(train_patiently, tmp_path, num_processes):
    code, _ = train_patiently(num_processes, lambda pid: os.kill(pid, signal.SIGTERM))
    assert code == 0
    assert len(list(tmp_path.glob("stopped*"))) == num_processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "send"),
    [(1, os.killpg), (2, os.killpg), (1, os.kill)],
    ids=["one process", "two processes", "sent to the command alone"],
)
def test_ctrl_c_ends_quietly_with_the_way_to_resume(train_patiently, num_processes, send):
    """A terminal sends SIGINT to all processes of the group."""
    code, errors = train_patiently(num_processes, lambda pid: send(pid, signal.SIGINT))
    assert code == INTERRUPTED
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("trl-singlepass train: ")
    assert "save_steps" in last


def test_after_ctrl_c_the_newest_checkpoint_is_named(monkeypatch, run, tmp_path):
    monkeypatch.setattr(launch, "launch_command", raising(KeyboardInterrupt()))
    monkeypatch.setattr(launch, "last_good_checkpoint", lambda folder: f"{folder}/checkpoint-20")
    code, out, err = run("train", "--output_dir", tmp_path, *TRAIN)
    assert (code, out) == (INTERRUPTED, "")
    assert "--resume_from_checkpoint auto" in err
    assert f"{tmp_path}/checkpoint-20" in err


def test_accelerate_configs_are_files_or_names(tmp_path):
    (tmp_path / "mine.yaml").write_text("")
    mine = str(tmp_path / "mine.yaml")
    assert launch.with_config_file(["--accelerate_config", mine, "--x"]) == ["--config_file", mine, "--x"]
    assert launch.with_config_file(["--x"]) == ["--x"]
    twice = ["--accelerate_config", "zero3", "--x", "--accelerate_config", mine]  # from a recipe, and as a flag
    assert launch.with_config_file(twice) == ["--config_file", mine, "--x"]
    assert Path(launch.with_config_file(["--accelerate_config", "zero3"])[1]).is_file()
    with pytest.raises(ValueError, match="expected one argument"):
        launch.with_config_file(["--accelerate_config"])


@pytest.mark.slow
def test_train_end_to_end(model, data, tmp_path):
    arguments = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(tmp_path / "out"), *TRAIN]
    command = [sys.executable, "-m", "trl_singlepass.cli", "train", *arguments, "--num_processes", "1", "--cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, env=environment, check=True, cwd=tmp_path)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(2, ["python"]), failed_child(2)])
def test_an_error_that_a_process_has_printed_is_not_told_again(monkeypatch, run, error):
    monkeypatch.setattr(launch, "launch_command", raising(error))
    assert run("train", "--output_dir", "x", *TRAIN) == (2, "", "")


@pytest.mark.parametrize(
    ("error", "how"), [(subprocess.CalledProcessError(1, ["python"]), "exit code 1"), (failed_child(-9), "SIGKILL")]
)
def test_other_ends_of_a_process_are_told_in_a_line(monkeypatch, run, error, how):
    monkeypatch.setattr(launch, "launch_command", raising(error))
    code, out, err = run("train", "--output_dir", "x", *TRAIN)
    assert (code, out) == (2, "")
    assert err.startswith("trl-singlepass train: ")
    assert err.count("\n") == 1
    assert how in err


@pytest.mark.parametrize(
    ("arguments", "module", "others"),
    [
        (["--debug"], launch.SCRIPTS["train"], []),
        ([], launch.WORKER, ["train"]),
        (["--debug", "underflow_overflow"], launch.WORKER, ["train", "--debug", "underflow_overflow"]),
    ],
)
def test_debug_runs_the_script_itself(monkeypatch, run, arguments, module, others):
    launched = []
    monkeypatch.setattr(launch, "launch_command", launched.append)
    assert run("train", *arguments, "--output_dir", "x", *TRAIN)[0] == 0
    assert launched[0].training_script == module
    assert launched[0].training_script_args == [*others, "--output_dir", "x", *TRAIN]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [["--num_processes", "1", "--cpu"], ["--num_processes", "2", "--multi_gpu"]])
def test_errors_of_processes_are_one_line(model, tmp_path, processes):
    arguments = ["--model_name_or_path", model, "--output_dir", str(tmp_path / "out"), *TRAIN]
    command = [sys.executable, "-m", "trl_singlepass.cli", "train", *arguments, *processes]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("trl-singlepass"))
    assert "--dataset_name" in line
    assert "Traceback" not in done.stderr
    assert "CalledProcessError" not in done.stderr


def parse(*arguments):
    parser = sft.make_parser(parser_class=launch.Parser)
    run, output_dir = launch.parse_launch(parser, [*arguments, "--output_dir", "x", *TRAIN], [launch.WORKER, "train"])
    assert output_dir == "x"
    return run


def test_the_script_gets_its_config_file_as_two_words(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1.0e-3\n")
    run = parse(f"--config={tmp_path / 'c.yaml'}")
    assert run.training_script_args[:3] == ["train", "--config", str(tmp_path / "c.yaml")]


@pytest.mark.parametrize("arguments", [[], ["--num_processes", "1", "--mixed_precision", "bf16"]])
def test_the_launcher_has_no_defaults_to_warn_about(arguments, caplog, monkeypatch):
    monkeypatch.setattr(launch, "default_config_file", "none")
    run = parse(*arguments)
    before = vars(run).copy()
    validated, *_ = _validate_launch_command(run)
    assert "were not passed" not in caplog.text
    for name in ("num_machines", "mixed_precision", "dynamo_backend", "num_processes", "multi_gpu"):
        assert getattr(validated, name) == before[name]
    assert validated.mixed_precision == ("bf16" if arguments else "no")


def test_what_a_configuration_file_says_is_not_replaced(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "distributed_type: MULTI_GPU\nmixed_precision: bf16\nnum_machines: 2\nnum_processes: 4\n"
    )
    run = parse("--accelerate_config", str(tmp_path / "mine.yaml"))
    assert (run.mixed_precision, run.num_machines, run.num_processes) == (None, None, None)


@pytest.mark.parametrize(("num_devices", "several"), [(0, False), (1, False), (8, True)])
def test_all_devices_are_used_unless_it_is_said_otherwise(monkeypatch, num_devices, several):
    monkeypatch.setattr(launch, "default_config_file", "none")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: num_devices)
    run = parse()
    assert (run.num_processes, bool(run.multi_gpu)) == (num_devices, several)


ONE = "distributed_type: '{}'\nnum_processes: {}\n"


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (["--num_processes", "2"], None),
        (["--num_processes", "2", "--cpu"], None),
        (["--num_processes", "2"], ONE.format("NO", 1)),
        (["--num_processes", "2"], ONE.format("MULTI_CPU", 1)),
        ([], ONE.format("NO", 2)),
    ],
)
def test_several_processes_that_would_be_one_are_refused(monkeypatch, tmp_path, arguments, file):
    monkeypatch.setattr(launch, "default_config_file", "none")
    if file is not None:
        (tmp_path / "mine.yaml").write_text(file)
        arguments = [*arguments, "--accelerate_config", str(tmp_path / "mine.yaml")]
    with pytest.raises(ValueError, match=r"--num_processes 2 .*--multi_gpu"):
        parse(*arguments)


@pytest.mark.parametrize("several", [["--multi_gpu"], ["--accelerate_config", "fsdp2"], ["--use_deepspeed"]])
def test_several_processes_that_do_start_are_fine(monkeypatch, several):
    monkeypatch.setattr(launch, "default_config_file", "none")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert parse("--num_processes", "2", *several).num_processes == 2


FSDP = [
    ["--fsdp", "full_shard"],
    ["--num_processes", "2", "--use_fsdp"],
    ["--accelerate_config", "fsdp2"],
    ["--accelerate_config", str(Path(__file__).parents[2] / "recipes" / "accelerate" / "fsdp2.yaml")],
]


@pytest.mark.parametrize("arguments", FSDP, ids=lambda arguments: Path(arguments[-1]).name)
def test_fsdp_without_a_gpu_says_what_to_try_before_a_process_starts(monkeypatch, run, arguments):
    monkeypatch.setattr(launch, "launch_command", lambda args: pytest.fail("started"))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    code, out, err = run("train", *arguments, "--output_dir", "x", *TRAIN)
    assert (code, out) == (2, "")
    assert "FSDP" in err
    assert "--num_processes 2 --multi_gpu --use_cpu true" in err


def test_one_process_may_keep_an_fsdp_configuration(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert parse("--num_processes", "1", "--accelerate_config", "fsdp2").num_processes == 1
