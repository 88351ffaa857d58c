"""The `trl-singlepass` command."""

from __future__ import annotations

import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any


EXAMPLES = {
    "train": "trl-singlepass train --model_name_or_path Qwen/Qwen3-0.6B --dataset_name data.jsonl --output_dir out",
    "inspect": "trl-singlepass inspect Qwen/Qwen3-0.6B data.jsonl --row 3 --html row3.html",
    "audit": "trl-singlepass audit Qwen/Qwen3-0.6B data.jsonl --html audit.html",
    "verify": "trl-singlepass verify Qwen/Qwen3-0.6B data.jsonl -n 4 --dtype float64",
    "bench": "trl-singlepass bench Qwen/Qwen3-0.6B data.jsonl -n 8 --dtype bfloat16",
}
SUMMARIES = {
    "train": "fine-tune as `trl sft` does, every turn exact in one pass (also: sft)",
    "inspect": "show one conversation as its tree: what is trained, with what weight, what is shared",
    "audit": "report what the data holds, what the chat template drops, what training costs",
    "verify": "compare the single pass with N-pass on your model and data; exit code 1 if they disagree",
    "bench": "time the single pass and N-pass on this machine, with the forecast beside it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments, those of the process by default.

    Returns:
        `int`: Exit code: 0, 1 if `verify` finds a disagreement, 2 for an error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    name = {"sft": "train"}.get(arguments[0], arguments[0])
    try:
        if name not in SUMMARIES:
            raise ValueError(f"There is no command '{arguments[0]}', only {', '.join(SUMMARIES)}.")
        return _train(arguments[1:]) if name == "train" else _look(name, arguments[1:])
    except Exception as error:  # the user gets a line whatever it is that goes wrong
        if "--debug" in arguments:
            raise
        from ..data.files import first_line

        known = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        print(f"trl-singlepass {arguments[0]}: {known}{first_line(error, 600)}", file=sys.stderr)
        return 2


def _help() -> str:
    lines = [f"  {name:9} {summary}" for name, summary in SUMMARIES.items()]
    return "\n".join(
        [
            "Exact single-pass supervised fine-tuning on multi-turn reasoning conversations.",
            "",
            "usage: trl-singlepass COMMAND [arguments]",
            "",
            *lines,
            "",
            "MODEL is a folder or a hub id; DATA a .jsonl or .parquet file, a folder, or a hub id.",
            "trl-singlepass COMMAND --help lists the arguments of a command.",
        ]
    )


def _look(name: str, arguments: list[str]) -> int:
    from rich.console import Console

    from . import commands

    dataclass = getattr(commands, f"{name.capitalize()}Arguments")
    parser = _parser_class()([dataclass], **_about(name))
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a model (of its tokenizer, to inspect)")
    parser.add_argument("data", metavar="DATA", help=".jsonl or .parquet file, folder, or hub id of a dataset")
    parser.add_argument("--config", metavar="FILE", help="YAML file with arguments; those given as flags win")
    _refuse_dangling_config(arguments)
    args, named = parser.parse_args_and_config(arguments)
    _quiet()
    # A file or a pipe has no width: tables need room there.
    console = Console(width=None if sys.stdout.isatty() else 118)
    run: Any = getattr(commands, name)
    return int(run(named.model, named.data, args, console))


def _train(arguments: list[str]) -> int:
    from ..scripts.sft import make_parser
    from .launch import launch

    _refuse_dangling_config(arguments)
    parser = make_parser(parser_class=_parser_class(), **_about("train"))
    launch(parser, [argument for argument in arguments if argument != "--debug"])
    return 0


def _about(name: str) -> dict[str, Any]:
    class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
        """Defaults with every argument, and the example as it is written."""

    summary = SUMMARIES[name]
    return {
        "prog": f"trl-singlepass {name}",
        "description": summary[0].upper() + summary[1:] + ".",
        "epilog": f"example:\n  {EXAMPLES[name]}",
        "formatter_class": Help,
        "allow_abbrev": False,
    }


def _parser_class() -> type:
    from trl import TrlParser

    class Parser(TrlParser):  # type: ignore[misc]
        """Parser whose errors are one line: the usage of `train` alone would fill the screen."""

        def error(self, message: str) -> Any:
            raise ValueError(f"{message} (--help lists the arguments)")

    return Parser


def _refuse_dangling_config(arguments: list[str]) -> None:
    if arguments and arguments[-1] == "--config":
        raise ValueError("--config needs a YAML file.")


def _quiet() -> None:
    """Leave out what libraries say on the way; warnings stay."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
