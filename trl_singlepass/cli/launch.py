"""`trl-singlepass train`: the training script through `accelerate launch`, as `trl sft` starts its own."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser

from ..training.preemption import SIGNALS


SCRIPT = "trl_singlepass.scripts.sft"
CONFIG_PACKAGES = ("trl.accelerate_configs", "trl_singlepass.accelerate_configs")


def launch(parser: Any, arguments: Sequence[str]) -> None:
    """
    Run the training script with the processes that `accelerate` is asked for.

    What asks to stop (`SIGTERM`, `SIGUSR1`) goes on to the processes, which save first; the run is over when they are.

    Args:
        parser (`trl.TrlParser`):
            Parser of the script's arguments. What it does not know goes to `accelerate launch`.
        arguments (`Sequence[str]`):
            Arguments of the command line.

    Raises:
        `ValueError`: If `--accelerate_config` names no configuration.
    """
    *_, of_config, of_command_line = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    for_accelerate = with_config_file([*of_config, *of_command_line])
    for_script = _without(arguments, of_command_line)
    run = launch_command_parser().parse_args([*for_accelerate, "--module", SCRIPT, *for_script])
    run.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # torchrun's others, which would end all within 30 seconds
    previous = {number: signal.signal(number, _to_processes) for number in SIGNALS}
    try:
        launch_command(run)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _to_processes(number: int, frame: FrameType | None) -> None:
    for process in psutil.Process().children():
        process.send_signal(number)


def with_config_file(arguments: Sequence[str]) -> list[str]:
    """
    Replace `--accelerate_config NAME` by the file that it names.

    Args:
        arguments (`Sequence[str]`):
            Arguments for `accelerate launch`. The name is that of a file, or of a configuration that TRL or this
            package ships (`fsdp2`, `zero3`, …).

    Returns:
        `list[str]`: Arguments that `accelerate launch` knows.

    Raises:
        `ValueError`: If there is no such configuration, or no name.
    """
    rest, path = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--accelerate_config":
            path = _config_file(next(remaining, None))  # the last one wins: a flag comes after the config file
        else:
            rest.append(argument)
    return rest if path is None else ["--config_file", path, *rest]


def _config_file(name: str | None) -> str:
    if name is None:
        raise ValueError("--accelerate_config needs a name or a file.")
    path = name if Path(name).is_file() else _shipped_configs().get(name)
    if path is None:
        raise ValueError(f"--accelerate_config {name} is neither a file nor one of {', '.join(_shipped_configs())}.")
    return path


def _shipped_configs() -> dict[str, str]:
    packages = [resources.files(package) for package in CONFIG_PACKAGES if _exists(package)]
    files = [file for package in packages for file in package.iterdir() if file.name.endswith(".yaml")]
    return dict(sorted((file.name.removesuffix(".yaml"), str(file)) for file in files))


def _exists(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _without(arguments: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Remove an ordered subsequence."""
    rest, remaining = [], list(taken)
    for argument in arguments:
        if remaining and argument == remaining[0]:
            remaining.pop(0)
        else:
            rest.append(argument)
    return rest
