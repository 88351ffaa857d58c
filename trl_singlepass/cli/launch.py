"""The commands that train: they run a training script through `accelerate launch`, as TRL's commands do."""

from __future__ import annotations

import logging
import signal
import subprocess
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib import import_module, resources
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from unittest.mock import patch

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import ComputeEnvironment, DistributedType
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from transformers.utils import is_torch_bf16_gpu_available

from ..groups.config import SinglePassGRPOConfig, SinglePassRLOOConfig
from ..preference.config import SinglePassDPOConfig
from ..scripts import SCRIPTS
from ..training.checkpoints import last_good_checkpoint
from ..training.config import EngineConfig, SinglePassSFTConfig, own_settings
from ..training.preemption import SIGNALS
from .arguments import EXPLAINED, INTERRUPTED, Parser, with_config_apart


WORKER = "trl_singlepass.cli.worker"  # runs a script, and prints errors without a traceback
_PATIENCE = 10.0  # seconds that processes get to end after Ctrl-C


# Settings of this package are those that these classes add to TRL's, or change.
_CONFIGS: dict[str, type[EngineConfig]] = {
    "train": SinglePassSFTConfig,
    "dpo": SinglePassDPOConfig,
    "grpo": SinglePassGRPOConfig,
    "rloo": SinglePassRLOOConfig,
}
_FIRST_RUN = {
    "model_name_or_path": "Folder or hub id of the model.",
    "dataset_name": "A .jsonl or .parquet file, a folder, or the hub id of a dataset.",
    "output_dir": "Folder for checkpoints and the trained model.",
    "accelerate_config": "File, or name of a configuration that TRL ships, such as fsdp2 or zero3.",
    "num_processes": "Number of processes, one per GPU.",
    "resume_from_checkpoint": "Checkpoint to resume from; 'auto' finds the newest intact one.",
}


def print_help(command: str, *, epilog: str, **about: str) -> None:
    """Print the flags of a first run, the settings of this package, and where others are."""
    of_trl = "sft" if command == "train" else command
    others = f"All arguments of `trl {of_trl}` (--help_all) and of `accelerate launch` (its --help) work as well."
    parser = Parser(usage="%(prog)s [arguments]", epilog=f"{others}\n\n{epilog}", **about)
    first = parser.add_argument_group("a first run")
    for name, text in _FIRST_RUN.items():
        first.add_argument(f"--{name}", help=text)
    own = parser.add_argument_group("settings of this package")
    config = _CONFIGS[command]
    settings = {item.name: item for item in fields(config)}
    for name in own_settings(config):
        own.add_argument(f"--{name}", default=settings[name].default, help=settings[name].metadata["help"])
    parser.print_help()


def launch(command: str, arguments: Sequence[str], *, debug: bool = False, **about: str) -> int:
    """
    Train with as many processes as `accelerate` is asked for; return 0, or 2 if a process has printed its error.

    `SIGTERM` and `SIGUSR1` are passed on to the processes, which save a checkpoint and stop. With `debug`, errors show
    their traceback. What is wrong before they start, or how one ended without a word, is a `ValueError`; Ctrl-C raises
    `KeyboardInterrupt`, with the way to resume.
    """
    make_parser = import_module(SCRIPTS[command]).make_parser
    run, output_dir = parse_launch(
        make_parser(parser_class=Parser, **about),
        arguments,
        [SCRIPTS[command]] if debug else [WORKER, command],
    )
    try:
        with _pass_on_signals(), _quiet_launcher(debug):
            launch_command(run)
    except KeyboardInterrupt:
        exit_code = INTERRUPTED
    except SignalException as error:  # torchrun's
        if error.sigval != signal.SIGINT:
            raise
        exit_code = INTERRUPTED
    except subprocess.CalledProcessError as error:
        exit_code = error.returncode
    except ChildFailedError as error:
        exit_code = error.get_first_failure()[1].exitcode
    else:
        return 0
    if exit_code == INTERRUPTED:
        _stop_processes()
        raise KeyboardInterrupt(_how_to_resume(output_dir))
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        raise ValueError(f"A training process was killed by {name}. After SIGKILL, look whether memory ran out.")
    if exit_code != EXPLAINED:
        raise ValueError(f"A training process ended with exit code {exit_code}; its traceback is above.")
    return EXPLAINED


def parse_launch(parser: Parser, arguments: Sequence[str], module: Sequence[str]) -> tuple[Namespace, str]:
    """
    Return the arguments of `accelerate launch`, which gets what the script does not know, and `output_dir`.

    `module` is what to run, with what it takes before the script's arguments. What would not start as asked for raises
    `ValueError`.
    """
    accelerate = launch_command_parser()
    accelerate.error = _raise_error
    flags = {*accelerate._option_string_actions, "--accelerate_config"}
    with _naming_bf16():
        (_, training_args, *_), from_config, from_command_line = parser.parse_divided(arguments, flags)
    for_accelerate = with_config_file([*from_config, *from_command_line])
    for_script = _without(with_config_apart(arguments), from_command_line)
    run: Namespace = accelerate.parse_args([*for_accelerate, "--module", *module, *for_script])
    _set_defaults(run)
    _check_processes(run, fsdp=bool(training_args.fsdp))
    run.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # not those of SIGNALS: torchrun would kill all after 30 seconds
    return run, training_args.output_dir


@contextmanager
def _naming_bf16() -> Iterator[None]:
    """Name the setting, a default of TRL's, that transformers refuses without a GPU for it."""
    try:
        yield
    except ValueError as error:
        if "bf16/gpu" not in str(error) or is_torch_bf16_gpu_available():
            raise
        raise ValueError(
            "bf16, the default, needs a GPU that computes in it, and there is none. Set bf16=False, or use_cpu=True "
            f"to train in bf16 on the CPU. (transformers: {error})"
        ) from error


def _set_defaults(run: Namespace) -> None:
    """Set the defaults of `accelerate launch` that it would warn about; those of a configuration file stay."""
    if run.config_file is not None or Path(default_config_file).is_file():
        return
    for name, value in {"num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}.items():
        if getattr(run, name) is None:
            setattr(run, name, value)
    if run.num_processes is None:
        run.num_processes = torch.accelerator.device_count()
        run.multi_gpu = run.multi_gpu or run.num_processes > 1


def _check_processes(run: Namespace, *, fsdp: bool) -> None:
    """Refuse to start one process where several are asked for, or FSDP (`fsdp`: by the script) without a GPU."""
    reads_file = run.config_file is not None or (Path(default_config_file).is_file() and not run.cpu)
    file = load_config_from_file(run.config_file) if reads_file else None
    if file is not None and file.compute_environment != ComputeEnvironment.LOCAL_MACHINE:
        return
    number = run.num_processes or (file.num_processes if file else 1)
    sharded = run.use_fsdp or (file is not None and file.distributed_type == DistributedType.FSDP)
    if (fsdp or (sharded and number > 1)) and not torch.accelerator.is_available() and not run.tpu:
        raise ValueError(
            "FSDP needs a GPU, and there is none. To try two processes on a CPU, use DDP: --num_processes 2 "
            "--multi_gpu --use_cpu true, and no FSDP configuration."
        )
    single = (DistributedType.NO, DistributedType.MULTI_CPU)  # the latter starts several through MPI only
    flags = run.multi_gpu or run.use_fsdp or run.use_deepspeed or run.use_megatron_lm or run.tpu or run.mpirun_hostfile
    several = flags or (file.distributed_type not in single if file else torch.accelerator.device_count() > 1)
    if number > 1 and (run.cpu or not several):
        raise ValueError(
            f"--num_processes {number} would start one process here. Add --multi_gpu, which starts {number} on GPUs, "
            "or on a CPU with --use_cpu true instead of --cpu. Or leave --num_processes out."
        )


def _raise_error(message: str) -> NoReturn:
    raise ValueError(f"{message} (accelerate launch --help lists its arguments)")


def with_config_file(arguments: Sequence[str]) -> list[str]:
    """Replace `--accelerate_config NAME` by `--config_file` with the file that it names; the last one counts."""
    parser = Parser(add_help=False)
    parser.add_argument("--accelerate_config")
    named, others = parser.parse_known_args(arguments)
    name: str | None = named.accelerate_config
    if name is None:
        return list(others)
    files = resources.files("trl.accelerate_configs").iterdir()
    shipped = {file.name.removesuffix(".yaml"): str(file) for file in files if file.name.endswith(".yaml")}
    path = name if Path(name).is_file() else shipped.get(name)
    if path is None:
        raise ValueError(f"--accelerate_config {name} is neither a file nor one of {', '.join(sorted(shipped))}.")
    return ["--config_file", path, *others]


def _without(arguments: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Remove an ordered subsequence."""
    rest, remaining = [], list(taken)
    for argument in arguments:
        if remaining and argument == remaining[0]:
            remaining.pop(0)
        else:
            rest.append(argument)
    return rest


@contextmanager
def _pass_on_signals() -> Iterator[None]:
    register = signal.signal
    previous = {number: register(number, _to_processes) for number in SIGNALS}

    def register_others(number: int, handler: Any) -> Any:
        # accelerate 1.16 would stop a lone process at SIGTERM, before it has saved a checkpoint.
        return signal.getsignal(number) if number in previous else register(number, handler)

    try:
        with patch.object(signal, "signal", register_others):
            yield
    finally:
        for number, handler in previous.items():
            register(number, handler)


def _to_processes(number: int, frame: FrameType | None) -> None:
    for process in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it has ended in the meantime
            process.send_signal(number)


def _stop_processes() -> None:
    """Stop what Ctrl-C has not reached: it may have been sent to this process alone."""
    _to_processes(signal.SIGINT, None)
    _, alive = psutil.wait_procs(psutil.Process().children(), timeout=_PATIENCE)
    for process in alive:
        process.kill()


def _how_to_resume(output_dir: str) -> str:
    checkpoint = last_good_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if checkpoint is None:
        return "Interrupted before the first checkpoint (save_steps): the same command starts again."
    return f"Interrupted. With --resume_from_checkpoint auto, the same command goes on from {checkpoint}."


@contextmanager
def _quiet_launcher(debug: bool) -> Iterator[None]:
    """Hide torchrun's log of failed processes: they print their errors, or `launch` tells how they ended."""
    names = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")
    before = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger, level in before.items():
        logger.setLevel(level if debug else logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
