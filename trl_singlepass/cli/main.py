"""The `trl-singlepass` command."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version

from .arguments import ADD_ARGUMENTS, CommandParser, peek
from .errors import CUT_OFF, INTERRUPTED, describe_error
from .hub import check_hub


@dataclass(frozen=True, slots=True)
class Command:
    """What the help says about a command."""

    summary: str  # what it does, in a line
    example: str  # how to call it


COMMANDS = {
    "train": Command(
        "fine-tune as `trl sft` does, with every turn exact in one pass (also: sft)",
        "trl-singlepass train --model_name_or_path Qwen/Qwen3-0.6B --dataset_name data.jsonl --output_dir out",
    ),
    "dpo": Command(
        "prefer one trajectory to another as `trl dpo` does, with every turn exact in one pass",
        "trl-singlepass dpo --model_name_or_path Qwen/Qwen3-0.6B --dataset_name pairs.jsonl --output_dir out",
    ),
    "grpo": Command(
        "reward completions in groups as `trl grpo` does, with their shared prefixes computed once",
        "trl-singlepass grpo --model_name_or_path Qwen/Qwen3-0.6B --dataset_name prompts.jsonl --output_dir out "
        "--reward_funcs rewards.mine",
    ),
    "rloo": Command(
        "the same as `trl rloo` does: each completion is compared with the others of its group",
        "trl-singlepass rloo --model_name_or_path Qwen/Qwen3-0.6B --dataset_name prompts.jsonl --output_dir out "
        "--reward_funcs rewards.mine",
    ),
    "inspect": Command(
        "show one conversation as a tree: what is trained, with what weight, and what is shared",
        "trl-singlepass inspect Qwen/Qwen3-0.6B data.jsonl --row 3 --html row3.html",
    ),
    "audit": Command(
        "report what data contains, what templates drop, what training costs; exit code 1 if no row can be trained",
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
    "chat": Command(
        "talk with a trained model; each turn sees the history that training renders",
        "trl-singlepass chat Qwen/Qwen3-0.6B --history strip",
    ),
    "recipes": Command(
        "list the training recipes that come with the package, print one, or write all",
        "trl-singlepass recipes cpu-smoke > cpu-smoke.yaml",
    ),
    "demo-model": Command(
        "write a tiny model with random weights, to try everything without a network",
        "trl-singlepass demo-model out/demo-model",
    ),
    "demo-data": Command(
        "write 240 conversations with reasoning and tool calls, preference pairs, or logs, to try everything on",
        "trl-singlepass demo-data out/demo-data.jsonl",
    ),
    "import": Command(
        "turn agent logs into a dataset that trains what was sent, reply by reply",
        "trl-singlepass import openai-chat proxy.jsonl -o data.jsonl",
    ),
}
ALIASES = {"sft": "train"}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command of `argv`, which defaults to the arguments of the process.

    Returns the exit code: 0, 1 if `verify` finds a difference or `doctor` something wrong, 2 for an error, and, as
    shells have it, 130 after Ctrl-C and 141 if nobody reads the output any more.
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
            close = get_close_matches(arguments[0], [*COMMANDS, *ALIASES], n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"There is no command '{arguments[0]}', only {', '.join(COMMANDS)}.{hint}")
        code = RUNNERS.get(name, _report)(name, arguments[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end goes nowhere
        return CUT_OFF
    except KeyboardInterrupt as error:
        if "--debug" in arguments:
            raise
        print(f"\ntrl-singlepass {arguments[0]}: {str(error) or 'Interrupted.'}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # users get no traceback, whatever goes wrong
        if "--debug" in arguments:
            raise
        print(f"trl-singlepass {arguments[0]}: {describe_error(error, name)}", file=sys.stderr)
        return 2


def _help() -> str:
    lines = [f"  {name:10} {command.summary}" for name, command in COMMANDS.items()]
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


def _report(name: str, arguments: list[str]) -> int:
    parser = CommandParser(**_about(name))
    ADD_ARGUMENTS[name](parser)
    args = parser.parse(arguments)
    check_hub(args.model, getattr(args, "data", None))
    from rich.console import Console

    from . import commands

    _quiet()
    # Files and pipes have no width, and tables need room.
    console = Console(width=None if sys.stdout.isatty() else 118)
    run: Callable[[Namespace, Console], int] = getattr(commands, name)
    return run(args, console)


def _train(name: str, arguments: list[str]) -> int:
    if any(flag in arguments for flag in ("-h", "--help")):
        from .launch import print_help

        print_help(name, **_about(name))
        return 0
    check_hub(*peek(arguments))
    from .launch import launch

    debug, others = _split_debug(arguments)
    return launch(name, ["--help" if flag == "--help_all" else flag for flag in others], debug=debug, **_about(name))


def _recipes(name: str, arguments: list[str]) -> int:
    from .recipes import list_recipes, read_recipe, write_recipes

    parser = _plain_parser(name)
    parser.add_argument("name", metavar="NAME", nargs="?", help="recipe to print; without it, they are listed")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="folder to write all of them to")
    args = parser.parse(arguments)
    if args.name is not None and args.output is not None:
        raise ValueError("give NAME to print a recipe, or --output to write all, not both")
    if args.output is not None:
        print(write_recipes(args.output))
    else:
        print(list_recipes() if args.name is None else read_recipe(args.name).rstrip("\n"))
    return 0


def _demo(name: str, arguments: list[str]) -> int:
    from .demo import write_demo_data, write_demo_logs, write_demo_model, write_demo_pairs

    parser = _plain_parser(name)
    write = write_demo_data if name == "demo-data" else write_demo_model
    if name == "demo-data":
        parser.add_argument("path", metavar="PATH", help="file to write; with --logs, a folder")
        other = parser.add_mutually_exclusive_group()
        pairs, logs = "write preference pairs, for `dpo`", "write logs of agents, for `import`"
        other.add_argument("--pairs", dest="write", action="store_const", const=write_demo_pairs, help=pairs)
        other.add_argument("--logs", dest="write", action="store_const", const=write_demo_logs, help=logs)
    else:
        parser.add_argument("path", metavar="FOLDER", help="folder to write")
    parser.set_defaults(write=write)
    args = parser.parse(arguments)
    _quiet()
    print(args.write(args.path))
    return 0


def _import(name: str, arguments: list[str]) -> int:
    from .import_logs import add_arguments, import_logs

    parser = _plain_parser(name)
    add_arguments(parser)
    print(import_logs(parser.parse(arguments)))
    return 0


RUNNERS = {
    "train": _train,
    "dpo": _train,
    "grpo": _train,
    "rloo": _train,
    "recipes": _recipes,
    "demo-model": _demo,
    "demo-data": _demo,
    "import": _import,
}
"""Commands that do more, or less, than report on a model and data."""


def _plain_parser(name: str) -> CommandParser:
    parser = CommandParser(**_about(name))
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


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
