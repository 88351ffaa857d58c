"""The `trl-singlepass` command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from .arguments import (
    AuditArguments,
    BenchArguments,
    CommandArguments,
    DoctorArguments,
    InspectArguments,
    VerifyArguments,
    parse_arguments,
    peek,
    refuse_dangling_config,
)
from .errors import describe_error
from .hub import check_hub
from .train_help import format_train_help


@dataclass(frozen=True, slots=True)
class Command:
    """
    What the help says about a command.

    Args:
        summary (`str`):
            What it does, in a line.
        example (`str`):
            How to call it.
    """

    summary: str
    example: str


COMMANDS = {
    "train": Command(
        "fine-tune as `trl sft` does, with every turn exact in one pass (also: sft)",
        "trl-singlepass train --model_name_or_path Qwen/Qwen3-0.6B --dataset_name data.jsonl --output_dir out",
    ),
    "inspect": Command(
        "show one conversation as a tree: what is trained, with what weight, and what is shared",
        "trl-singlepass inspect Qwen/Qwen3-0.6B data.jsonl --row 3 --html row3.html",
    ),
    "audit": Command(
        "report what the data contains, what the chat template drops, and what training costs",
        "trl-singlepass audit Qwen/Qwen3-0.6B data.jsonl --html audit.html",
    ),
    "verify": Command(
        "compare the single pass with N-pass on your model and data; exit code 1 if they differ",
        "trl-singlepass verify Qwen/Qwen3-0.6B data.jsonl -n 4 --dtype float64",
    ),
    "bench": Command(
        "time the single pass and N-pass on this machine, next to the forecast",
        "trl-singlepass bench Qwen/Qwen3-0.6B data.jsonl -n 8 --dtype bfloat16",
    ),
    "doctor": Command(
        "check this machine: versions, kernel, exactness, time and memory; exit code 1 if something is wrong",
        "trl-singlepass doctor Qwen/Qwen3-0.6B --json doctor.json",
    ),
}
ALIASES = {"sft": "train"}
ARGUMENTS: dict[str, type[CommandArguments]] = {
    "inspect": InspectArguments,
    "audit": AuditArguments,
    "verify": VerifyArguments,
    "bench": BenchArguments,
    "doctor": DoctorArguments,
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments; those of the process by default.

    Returns:
        `int`: Exit code: 0, 1 if `verify` finds a difference or `doctor` something wrong, 2 for an error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"trl-singlepass {version('trl-singlepass')}")
        return 0
    name = ALIASES.get(arguments[0], arguments[0])
    try:
        if name not in COMMANDS:
            raise ValueError(f"There is no command '{arguments[0]}', only {', '.join(COMMANDS)}.")
        return _train(arguments[1:]) if name == "train" else _report(name, arguments[1:])
    except Exception as error:  # users get one line, whatever goes wrong
        if "--debug" in arguments:
            raise
        print(f"trl-singlepass {arguments[0]}: {describe_error(error)}", file=sys.stderr)
        return 2


def _help() -> str:
    lines = [f"  {name:9} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Exact single-pass supervised fine-tuning on multi-turn reasoning conversations.",
            "",
            "usage: trl-singlepass COMMAND [arguments]",
            "",
            *lines,
            "",
            "MODEL is a folder or a hub id; DATA is a .jsonl or .parquet file, a folder, or a hub id.",
            "trl-singlepass COMMAND --help lists the arguments of a command, --version prints the version.",
        ]
    )


def _report(name: str, arguments: Sequence[str]) -> int:
    args: Any = parse_arguments(ARGUMENTS[name], arguments, **_about(name))
    check_hub(args.model, getattr(args, "data", None))
    from rich.console import Console

    from . import commands

    _quiet()
    # Files and pipes have no width, and tables need room.
    console = Console(width=None if sys.stdout.isatty() else 118)
    run: Callable[[Any, Console], int] = getattr(commands, name)
    return run(args, console)


def _train(arguments: list[str]) -> int:
    if any(flag in arguments for flag in ("-h", "--help")):
        print(format_train_help(COMMANDS["train"].summary, COMMANDS["train"].example))
        return 0
    refuse_dangling_config(arguments)
    check_hub(*peek(arguments, "model_name_or_path", "dataset_name"))
    from .launch import launch

    debug, others = _split_debug(arguments)
    return launch(["--help" if flag == "--help_all" else flag for flag in others], debug=debug, **_about("train"))


def _split_debug(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Take out `--debug` unless a value follows: transformers has a setting of that name that takes one."""
    debug, others = False, []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if argument == "--debug" and following.startswith("--"):
            debug = True
        else:
            others.append(argument)
    return debug, others


def _about(name: str) -> dict[str, str]:
    command = COMMANDS[name]
    return {
        "prog": f"trl-singlepass {name}",
        "description": f"{command.summary[0].upper()}{command.summary[1:]}.",
        "epilog": f"example:\n  {command.example}",
    }


def _quiet() -> None:
    """Hide the libraries' progress bars and deprecations; other warnings stay."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
