"""The `trl-singlepass` command."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from ..scripts import SCRIPTS
from .arguments import ADD_ARGUMENTS, CUT_OFF, INTERRUPTED, CommandParser, describe_error, peek


class Command(NamedTuple):
    """What the help says about a command: what it does, in a line, and how to call it."""

    summary: str
    example: str
    next: str = ""  # command that comes after it, with names of its arguments


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
        "audit {model} {data}",
    ),
    "audit": Command(
        "report what data contains, what templates drop, what training costs; exit code 1 if no row can be trained",
        "trl-singlepass audit Qwen/Qwen3-0.6B data.jsonl --html audit.html",
        "verify {model} {data}",
    ),
    "verify": Command(
        "compare the single pass with N-pass on your model and data; exit code 1 if they differ",
        "trl-singlepass verify Qwen/Qwen3-0.6B data.jsonl -n 4 --dtype float64",
        "train --model_name_or_path {model} --dataset_name {data} --output_dir out",
    ),
    "bench": Command(
        "time the single pass and N-pass on this machine, next to the forecast",
        "trl-singlepass bench Qwen/Qwen3-0.6B data.jsonl -n 8 --dtype bfloat16",
        "train --model_name_or_path {model} --dataset_name {data} --output_dir out",
    ),
    "doctor": Command(
        "check this machine: versions, kernel, exactness, time and memory; exit code 1 if something is wrong",
        "trl-singlepass doctor Qwen/Qwen3-0.6B --json doctor.json",
        "audit {model} DATA",
    ),
    "chat": Command(
        "talk with a trained model; each turn sees the history that training renders",
        "trl-singlepass chat Qwen/Qwen3-0.6B --history strip",
        "verify {model} DATA",
    ),
    "recipes": Command(
        "list the training recipes that come with the package, print one, or write all",
        "trl-singlepass recipes cpu-smoke > cpu-smoke.yaml",
        "train --config FILE",
    ),
    "demo-model": Command(
        "write a tiny model with random weights, to try everything without a network",
        "trl-singlepass demo-model out/demo-model",
        "demo-data out/demo-data.jsonl",
    ),
    "demo-data": Command(
        "write 240 conversations with reasoning and tool calls, preference pairs, or logs, to try everything on",
        "trl-singlepass demo-data out/demo-data.jsonl",
        "inspect MODEL DATA",
    ),
    "import": Command(
        "turn agent logs into a dataset that trains what was sent, reply by reply",
        "trl-singlepass import openai-chat proxy.jsonl -o data.jsonl",
        "audit MODEL {output}",
    ),
}
ALIASES = {"sft": "train"}
_TIMEOUT = 2.0  # seconds
_MODEL_FILES = ("config.json", "tokenizer_config.json", "adapter_config.json")


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
    args = _parse(name, arguments)
    check_hub(args.model, getattr(args, "data", None))
    from rich.console import Console

    from . import commands

    _quiet()
    # Files and pipes have no width, and tables need room.
    console = Console(width=None if sys.stdout.isatty() else 118)
    run: Callable[[Namespace, Console], int] = getattr(commands, name)
    code = run(args, console)
    return code or _say_what_is_next(name, args)


def _write(name: str, arguments: list[str]) -> int:
    args = _parse(name, arguments)
    from . import file_commands

    if name == "demo-model":
        _quiet()
    write = {"recipes": file_commands.recipes, "import": file_commands.import_logs}.get(name, file_commands.write_demo)
    print(write(args))
    return _say_what_is_next(name, args)


def _say_what_is_next(name: str, args: Namespace) -> int:
    """Name the command that comes after one that went well, beside its output; return its exit code."""
    given = {key: quote(str(value)) for key, value in vars(args).items()}
    print(f"Next: trl-singlepass {COMMANDS[name].next.format_map(given)}", file=sys.stderr)
    return 0


def _parse(name: str, arguments: list[str]) -> Namespace:
    parser = CommandParser(**_about(name))
    ADD_ARGUMENTS[name](parser)
    return parser.parse(arguments)


def _train(name: str, arguments: list[str]) -> int:
    if any(flag in arguments for flag in ("-h", "--help")):
        from .launch import print_help

        print_help(name, **_about(name))
        return 0
    check_hub(*peek(arguments))
    from .launch import launch

    debug, others = _split_debug(arguments)
    return launch(name, ["--help" if flag == "--help_all" else flag for flag in others], debug=debug, **_about(name))


RUNNERS = {
    **dict.fromkeys(SCRIPTS, _train),
    **dict.fromkeys(("recipes", "demo-model", "demo-data", "import"), _write),
}
"""What runs commands that do more, or less, than report on a model and data."""


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


# Without a network, only cached models and datasets can be loaded ----------------------------------------------------


def check_hub(model: str | None, data: str | None) -> None:
    """
    Refuse a model that cannot be loaded with `ValueError`, and go offline if the Hub does not answer.

    Left to themselves, libraries try again for each file of a model, for most of a minute. Processes that are started
    later are offline too.
    """
    on_hub = [name for name in (model, data) if name is not None and not Path(name).expanduser().exists()]
    if not on_hub:
        return
    # Imported only now: neither `--help` nor local files need it.
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not constants.HF_HUB_OFFLINE and not _answers(constants.ENDPOINT):
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
    if model not in on_hub:
        return
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise ValueError(f"{model} cannot be loaded: it is neither a folder nor the id of a model.") from error
    if constants.HF_HUB_OFFLINE and not any(
        isinstance(try_to_load_from_cache(model, file), str) for file in _MODEL_FILES
    ):
        raise ValueError(
            f"{model} cannot be loaded: it is neither a folder nor in the cache, and the Hub does not answer or "
            "HF_HUB_OFFLINE is set."
        )


def _answers(endpoint: str) -> bool:
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=_TIMEOUT)
    except Exception:  # the HTTP library of huggingface_hub, and so the type of the exception, depends on its version
        return False
    return True
