"""Arguments of the commands, TRL's parser as all of them use it, and errors as they show them."""

from __future__ import annotations

import re
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Any, NoReturn

from trl.scripts.utils import TrlParser  # without PyTorch, which takes seconds

from ..data.logs import LogSource
from ..scripts import SCRIPTS
from ..trees.errors import DataError, as_sentence, printable


EXPLAINED = 2
"""Exit code of a process that has printed its error."""
INTERRUPTED = 130
"""Exit code of a process that Ctrl-C has ended, as shells have it."""
CUT_OFF = 141
"""Exit code of a process whose output nobody reads any more, as in `trl-singlepass recipes | head`."""
# What users can act on: wrong arguments, files, rows and models, and packages that are not installed.
USER_ERRORS = (ValueError, OSError, ImportError, NotImplementedError)
# A setting as Python has it, with a value that can be typed: `bad_rows='drop'`.
_SETTING = re.compile(r"(?<![\w.'\"-])(\w+)=(?:'([\w./-]+)'|(True|False|-?\d+(?:\.\d+)?(?:e-?\d+)?))(?![\w(])")


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults other than `None`, and examples as they are written."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(TrlParser):  # type: ignore[misc]
    """TRL's parser, of whole flags only, with errors in one line: usage and all arguments would fill the screen."""

    def __init__(self, dataclass_types: Iterable[type] = (), /, **about: Any) -> None:
        super().__init__(list(dataclass_types), allow_abbrev=False, formatter_class=HelpFormatter, **about)
        self.add_argument("--config", metavar="FILE", help="YAML file with arguments; flags override it.")

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong as a `ValueError`."""
        raise ValueError(f"{message} (--help lists the arguments)")

    def parse_divided(
        self, arguments: Sequence[str], others: Collection[str] = ()
    ) -> tuple[list[Any], list[str], list[str]]:
        """
        Return what is parsed, and what is not this parser's: of the `--config` file, and of the command line.

        An argument that is not one of the flags `others` either raises `ValueError`, with the one that it looks like.
        """
        given = with_config_apart(arguments)
        *parsed, of_config, of_command_line = self.parse_args_and_config(
            given, return_remaining_strings=True, separate_remaining_strings=True
        )
        known = [*self._option_string_actions, *others]
        file = f"{given[given.index('--config') + 1]}: " if of_config else ""
        for source, left in ((file, of_config), ("", of_command_line)):
            names = [name for name in left if not others or name.startswith("--")]  # others may have values
            unknown = [name for name in (name.partition("=")[0] for name in names) if name not in others]
            if unknown:
                close = get_close_matches(unknown[0], known, n=1)
                hint = f"Did you mean {close[0]}?" if close else "--help lists the arguments."
                raise ValueError(f"{source}no argument is called {unknown[0]}. {hint}")
        return parsed, of_config, of_command_line


class CommandParser(Parser):
    """Parser of a command's own arguments; values of a `--config` file are checked like those of the command line."""

    def __init__(self, **about: str) -> None:
        super().__init__(**about)
        self._booleans: set[str] = set()
        self.flag("debug", "Show the traceback of an error.", bool, False)

    def flag(self, name: str, help: str, kind: type = str, default: object = None, **options: Any) -> None:
        """Add a flag, spelt with underscores or dashes; a boolean one may come without a value."""
        names = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}", *options.pop("aliases", ())])
        if kind is bool:
            self._booleans |= names.keys()
            options["nargs"] = "?"  # so that the help shows it
        convert = _to_bool if kind is bool else kind
        self.add_argument(*names, dest=name, help=help, type=convert, default=default, **options)

    def parse(self, arguments: Sequence[str]) -> Namespace:
        """Return the arguments; one that is unknown, missing or of the wrong type raises `ValueError`."""
        words = [
            f"{word}=true" if word in self._booleans and following.lower() not in _BOOLEANS else word
            for word, following in zip(arguments, [*arguments[1:], ""], strict=False)
        ]
        (args,), *_ = self.parse_divided(words)
        named: Namespace = args
        return named

    def set_defaults_with_config(self, **config: object) -> list[str]:
        """Take numbers as text, which argparse converts to the type of their flag."""
        texts = {name: str(value) if type(value) in (int, float) else value for name, value in config.items()}
        left: list[str] = super().set_defaults_with_config(**texts)
        return left


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _to_bool(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ArgumentTypeError(f"expected true or false, got {text!r}")
    return _BOOLEANS[text.lower()]


def with_config_apart(arguments: Sequence[str]) -> list[str]:
    """Return arguments with `--config FILE` as two words, as TRL's parser reads it; no file raises `ValueError`."""
    if arguments and arguments[-1] == "--config":
        raise ValueError("--config needs a YAML file.")
    return [
        word for given in arguments for word in (given.split("=", 1) if given.startswith("--config=") else [given])
    ]


@dataclass
class _OnHub:
    """What a training script loads, from the Hub or elsewhere."""

    model_name_or_path: str | None = None
    dataset_name: str | None = None


def peek(arguments: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the model and the dataset of a training script, without importing it."""
    parser = Parser([_OnHub], add_help=False)
    named, *_ = parser.parse_args_and_config(with_config_apart(arguments), return_remaining_strings=True)
    return named.model_name_or_path, named.dataset_name


# The arguments of each command ---------------------------------------------------------------------------------------


_DEVICE = ("device", "Device to run on; a GPU by default if there is one.")
_TRUST = ("trust_remote_code", "Whether code that comes with the model may run on this machine.", bool, False)
_JSON = ("json", "File to write the report to as JSON; '-' prints it.")


def _add_tokenizer(parser: CommandParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="Folder or hub id of a model; `inspect` reads its tokenizer only."
    )
    parser.flag("chat_template", "File with a chat template to use instead of the tokenizer's own.")
    parser.flag(*_TRUST)


def _add_data(parser: CommandParser) -> None:
    _add_tokenizer(parser)
    parser.add_argument(
        "data", metavar="DATA", help="A .jsonl or .parquet file, a folder, or the hub id of a dataset."
    )
    parser.flag("split", "Split of a folder or of a dataset on the Hub.", default="train")
    parser.flag("dataset_config", "Configuration of a dataset on the Hub.")


def _add_inspect(parser: CommandParser) -> None:
    _add_data(parser)
    parser.flag("row", "Position of the conversation, from 0.", int, 0)
    parser.flag("html", "File to write a page to, with tokens, tree and attention mask.")
    parser.flag("png", "File to write a picture of the tree to, with one of the mask beside it.")


def _add_audit(parser: CommandParser) -> None:
    _add_data(parser)
    parser.flag("sample_size", "Number of rows to draw at random; at most 500 by default.", int)
    parser.flag("seed", "Seed of the draw.", int, 0)
    parser.flag("max_length", "Length in tokens to compare samples with; the model's by default.", int)
    parser.flag("num_proc", "Number of processes.", int)
    parser.flag(*_JSON)
    parser.flag("html", "File to write the report to as a page with plots.")


def _add_runs(parser: CommandParser) -> None:
    _add_data(parser)
    dtypes = ["float64", "float32", "bfloat16", "float16"]
    parser.flag("num_rows", "Number of conversations, from the first.", int, 4, aliases=["-n"])
    parser.flag("dtype", "Data type of the weights.", default="float32", choices=dtypes)
    parser.flag("attn_implementation", "Attention implementation of the model.")
    parser.flag(*_DEVICE)


def _add_verify(parser: CommandParser) -> None:
    _add_runs(parser)
    text = "Tokens of separate samples to check of each conversation: only its first turns that fit are compared."
    parser.flag("max_tokens", text, int)


def _add_bench(parser: CommandParser) -> None:
    _add_runs(parser)
    parser.flag("repeats", "Timed runs of each conversation, after one warm-up run.", int, 3)


def _add_doctor(parser: CommandParser) -> None:
    text = "Folder or hub id of a model; a small one by default."
    parser.add_argument("model", metavar="MODEL", nargs="?", help=text)
    parser.flag("turns", "Lengths of the conversations to time, in turns.", default="2,8,16")
    parser.flag("attn_implementation", "Attention implementation of the model.")
    parser.flag(*_DEVICE)
    parser.flag(*_JSON)
    parser.flag(*_TRUST)


def _add_chat(parser: CommandParser) -> None:
    _add_tokenizer(parser)
    histories = ["template", "keep", "strip"]
    text = "What contexts show of earlier turns, as in training."
    parser.flag("history", text, default="template", choices=histories)
    parser.flag("system", "System prompt.")
    parser.set_defaults(dtype="auto", attn_implementation=None)
    parser.flag("max_new_tokens", "Largest number of tokens of a reply.", int, 1024)
    parser.flag(*_DEVICE)


def _add_recipes(parser: CommandParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="recipe to print; without it, they are listed")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="folder to write all of them to")


def _add_demo_model(parser: CommandParser) -> None:
    parser.add_argument("path", metavar="FOLDER", help="folder to write")
    parser.set_defaults(kind="model")


def _add_demo_data(parser: CommandParser) -> None:
    parser.add_argument("path", metavar="PATH", help="file to write; with --logs, a folder")
    other = parser.add_mutually_exclusive_group()
    pairs, logs = "write preference pairs, for `dpo`", "write logs of agents, for `import`"
    other.add_argument("--pairs", dest="kind", action="store_const", const="pairs", help=pairs)
    other.add_argument("--logs", dest="kind", action="store_const", const="logs", help=logs)


def _add_import(parser: CommandParser) -> None:
    sources = list(map(str, LogSource))
    parser.add_argument("source", metavar="SOURCE", choices=sources, help=f"format of the logs: {', '.join(sources)}")
    parser.add_argument("files", metavar="FILES", nargs="+", help="files of the log, or folders that hold them")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="JSON Lines file to write")
    text = (
        "What happens to lines that cannot be trained as sent: an error names all, or they are left out and counted."
    )
    parser.flag("bad_lines", text, default="error", choices=["error", "drop"])
    text = "Text file with the system prompt of requests that have none, as in a transcript."
    parser.flag("system_prompt", text, metavar="FILE")
    text = "JSON file with the tools of requests that have none, as in a transcript."
    parser.flag("tools", text, metavar="FILE")
    text = "Leave attachments in transcripts of Claude Code out of contexts: how they were worded is not in there."
    parser.flag("skip_attachments", text, bool, False)


ADD_ARGUMENTS: dict[str, Callable[[CommandParser], None]] = {
    "inspect": _add_inspect,
    "audit": _add_audit,
    "verify": _add_verify,
    "bench": _add_bench,
    "doctor": _add_doctor,
    "chat": _add_chat,
    "recipes": _add_recipes,
    "demo-model": _add_demo_model,
    "demo-data": _add_demo_data,
    "import": _add_import,
}
"""What adds the arguments of each command that does not train."""


# Errors as the command line shows them -------------------------------------------------------------------------------


def describe_error(error: BaseException, command: str) -> str:
    """
    Return the text of an error: one line, or those of a `DataError`.

    It has its type unless it is a `ValueError`; settings are spelt like the flags of a command that trains.
    """
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    # A worker of a DataLoader puts its traceback first.
    text = str(error).rpartition(f"\n{type(error).__module__}.{type(error).__qualname__}: ")[2]
    lines = text.splitlines() if isinstance(error, DataError) else [text]
    whole = "\n".join(line for line in (" ".join(line.split()) for line in lines) if line) or type(error).__name__

    def as_typed(setting: re.Match[str]) -> str:
        name, word, value = setting.groups()
        return f"--{name} {word or value.lower()}" if f"--{name}" in _flags_of(command) else setting[0]

    return kind + as_sentence(_SETTING.sub(as_typed, printable(whole)))


@cache
def _flags_of(command: str) -> Collection[str]:
    """Return the flags of the script of a command: none if it has no script, which takes seconds to import."""
    if command not in SCRIPTS:
        return ()
    flags: Collection[str] = import_module(SCRIPTS[command]).make_parser()._option_string_actions
    return flags
