"""`trl-singlepass train`: runs the training script through `accelerate launch`, as `trl sft` does."""

from __future__ import annotations

import logging
import signal
import subprocess
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl import TrlParser

from ..scripts.sft import make_parser
from ..training.preemption import SIGNALS
from .arguments import HelpFormatter, OneLineErrors, refuse_unknown
from .worker import EXPLAINED


SCRIPT = "trl_singlepass.scripts.sft"
WORKER = "trl_singlepass.cli.worker"  # the script with errors in one line


class Parser(OneLineErrors, TrlParser):  # type: ignore[misc]
    """TRL's parser with errors in one line."""


def launch(arguments: Sequence[str], *, debug: bool = False, **about: str) -> int:
    """
    Train with as many processes as `accelerate` is asked for.

    `SIGTERM` and `SIGUSR1` are passed on to the processes, which save a checkpoint and stop.

    Args:
        arguments (`Sequence[str]`):
            Arguments of the command line, for the script and for `accelerate launch`.
        debug (`bool`, *optional*, defaults to `False`):
            Whether processes show the traceback of every error.
        **about (`str`):
            Arguments of `argparse.ArgumentParser`, such as `prog` and `description`.

    Returns:
        `int`: Exit code: 0, or 2 if a process has printed its error.

    Raises:
        `ValueError`: If there is no such argument or configuration, or a process ended without a word.
    """
    run = parse_launch(
        make_parser(parser_class=Parser, formatter_class=HelpFormatter, allow_abbrev=False, **about),
        arguments,
        SCRIPT if debug else WORKER,
    )
    try:
        with _pass_on_signals(), _quiet_launcher(debug):
            launch_command(run)
    except subprocess.CalledProcessError as error:
        return _explain(error.returncode)
    except ChildFailedError as error:
        return _explain(error.get_first_failure()[1].exitcode)
    return 0


def parse_launch(parser: TrlParser, arguments: Sequence[str], module: str) -> Namespace:
    """
    Divide the arguments between the script and `accelerate launch`.

    Args:
        parser (`trl.TrlParser`):
            Parser of the script's arguments. `accelerate launch` gets what it does not know.
        arguments (`Sequence[str]`):
            Arguments of the command line.
        module (`str`):
            Module to run.

    Returns:
        `argparse.Namespace`: Arguments of `accelerate launch`.

    Raises:
        `ValueError`: If neither knows an argument, or there is no such configuration.
    """
    *_, from_config, from_command_line = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    accelerate = launch_command_parser()
    accelerate.error = _raise_error
    flags = {*accelerate._option_string_actions, "--accelerate_config"}
    known = [*parser._option_string_actions, *flags]
    for source, given in (("config file: ", from_config), ("", from_command_line)):
        names = [argument for argument in given if argument.startswith("--")]
        refuse_unknown([name for name in names if name.partition("=")[0] not in flags], known, source)
    for_accelerate = with_config_file([*from_config, *from_command_line])
    for_script = _without(arguments, from_command_line)
    run: Namespace = accelerate.parse_args([*for_accelerate, "--module", module, *for_script])
    _set_defaults(run)
    run.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # not those of SIGNALS: torchrun would kill all after 30 seconds
    return run


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


def _raise_error(message: str) -> NoReturn:
    raise ValueError(f"{message} (accelerate launch --help lists its arguments)")


def with_config_file(arguments: Sequence[str]) -> list[str]:
    """
    Replace `--accelerate_config NAME` by `--config_file` with the file that it names.

    Args:
        arguments (`Sequence[str]`):
            Arguments for `accelerate launch`. The name is a file, or a configuration that TRL ships (`fsdp2`, `zero3`,
            …). The last one counts: flags come after the config file.

    Returns:
        `list[str]`: Arguments that `accelerate launch` knows.

    Raises:
        `ValueError`: If there is no such configuration, or no name.
    """
    parser = OneLineErrors(add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    named, others = parser.parse_known_args(arguments)
    if named.accelerate_config is None:
        return others
    return ["--config_file", _find_config(named.accelerate_config), *others]


def _find_config(name: str) -> str:
    files = resources.files("trl.accelerate_configs").iterdir()
    shipped = {file.name.removesuffix(".yaml"): str(file) for file in files if file.name.endswith(".yaml")}
    path = name if Path(name).is_file() else shipped.get(name)
    if path is None:
        raise ValueError(f"--accelerate_config {name} is neither a file nor one of {', '.join(sorted(shipped))}.")
    return path


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
    previous = {number: signal.signal(number, _to_processes) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _to_processes(number: int, frame: FrameType | None) -> None:
    for process in psutil.Process().children():
        process.send_signal(number)


@contextmanager
def _quiet_launcher(debug: bool) -> Iterator[None]:
    """Hide torchrun's log of failed processes: they print their errors, or `launch` tells how they ended."""
    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    before = logger.level
    logger.setLevel(before if debug else logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _explain(exit_code: int) -> int:
    if exit_code == EXPLAINED:
        return EXPLAINED
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        raise ValueError(f"A training process was killed by {name}. After SIGKILL, look whether memory ran out.")
    raise ValueError(f"A training process ended with exit code {exit_code}; its traceback is above.")
