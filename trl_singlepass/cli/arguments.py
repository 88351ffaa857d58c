"""
Arguments of the commands that report on a model and data.

The parser works like `trl.TrlParser`, which parses those of `train`, but imports neither TRL nor PyTorch. That makes
`--help` fast.
"""

from __future__ import annotations

import os
from argparse import (
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    ArgumentTypeError,
    RawDescriptionHelpFormatter,
)
from collections.abc import Collection, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml


@dataclass
class CommandArguments:
    """Arguments of a command: each is a field with its `help` as metadata."""


@dataclass
class DataArguments(CommandArguments):
    """The model's tokenizer, the conversations, and how to render them."""

    model: str = field(metadata={"help": "Folder or hub id of a model; for `inspect`, its tokenizer is enough."})
    data: str = field(metadata={"help": "A .jsonl or .parquet file, a folder, or the hub id of a dataset."})
    split: str = field(default="train", metadata={"help": "Split of a folder or of a dataset on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    chat_template: str | None = field(
        default=None, metadata={"help": "File with a chat template to use instead of the tokenizer's own."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether code that comes with the model may run on this machine."}
    )
    debug: bool = field(default=False, metadata={"help": "Show the traceback of an error."})


@dataclass
class InspectArguments(DataArguments):
    """Arguments of `inspect`."""

    row: int = field(default=0, metadata={"help": "Position of the conversation, from 0."})
    html: str | None = field(
        default=None, metadata={"help": "File to write a page to, with tokens, tree and attention mask."}
    )
    png: str | None = field(
        default=None, metadata={"help": "File to write a picture of the tree to, with one of the mask beside it."}
    )


@dataclass
class AuditArguments(DataArguments):
    """Arguments of `audit`."""

    sample_size: int | None = field(
        default=None, metadata={"help": "Number of rows to draw at random; at most 500 by default."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the draw."})
    max_length: int | None = field(
        default=None, metadata={"help": "Length in tokens to compare samples with; the model's by default."}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Number of processes."})
    json: str | None = field(default=None, metadata={"help": "File to write the report to as JSON; '-' prints it."})
    html: str | None = field(default=None, metadata={"help": "File to write the report to as a page with plots."})


@dataclass
class ModelArguments(DataArguments):
    """How to load and run the model."""

    num_rows: int = field(default=4, metadata={"flags": ["-n"], "help": "Number of conversations, from the first."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Data type of the weights.", "choices": ["float64", "float32", "bfloat16", "float16"]},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation of the model."})
    device: str | None = field(default=None, metadata={"help": "Device to run on; a GPU by default if there is one."})


@dataclass
class VerifyArguments(ModelArguments):
    """Arguments of `verify`."""

    max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of separate samples to check of each conversation: only its first turns that fit are "
            "compared."
        },
    )


@dataclass
class BenchArguments(ModelArguments):
    """Arguments of `bench`."""

    repeats: int = field(default=3, metadata={"help": "Timed runs of each conversation, after one warm-up run."})


@dataclass
class DoctorArguments(CommandArguments):
    """Arguments of `doctor`."""

    model: str | None = field(
        default=None, metadata={"positional": True, "help": "Folder or hub id of a model; a small one by default."}
    )
    turns: str = field(default="2,8,16", metadata={"help": "Lengths of the conversations to time, in turns."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation of the model."})
    device: str | None = field(default=None, metadata={"help": "Device to run on; a GPU by default if there is one."})
    json: str | None = field(default=None, metadata={"help": "File to write the report to as JSON; '-' prints it."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether code that comes with the model may run on this machine."}
    )
    debug: bool = field(default=False, metadata={"help": "Show the traceback of an error."})


@dataclass
class ChatArguments(CommandArguments):
    """Arguments of `chat`."""

    model: str = field(metadata={"help": "Folder of the trained model, or the hub id of one."})
    history: str = field(
        default="template",
        metadata={
            "help": "What contexts show of earlier turns, as in training.",
            "choices": ["template", "keep", "strip"],
        },
    )
    system: str | None = field(default=None, metadata={"help": "System prompt."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Largest number of tokens of a reply."})
    chat_template: str | None = field(
        default=None, metadata={"help": "File with a chat template to use instead of the tokenizer's own."}
    )
    device: str | None = field(default=None, metadata={"help": "Device to run on; a GPU by default if there is one."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether code that comes with the model may run on this machine."}
    )
    debug: bool = field(default=False, metadata={"help": "Show the traceback of an error."})


Arguments = TypeVar("Arguments", bound=CommandArguments)


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults other than `None`, and examples as they are written."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class OneLineErrors(ArgumentParser):
    """Parser whose errors are one line: usage and all arguments would fill the screen."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong as a `ValueError`."""
        raise ValueError(f"{message} (--help lists the arguments)")


def parse_arguments(argument_type: type[Arguments], arguments: Sequence[str], **about: Any) -> Arguments:
    """
    Parse the arguments of a command to an object of `argument_type`, a dataclass.

    Fields without a default, or marked so, are positional. Arguments of the command line override those of a
    `--config` file; `about` goes to `argparse.ArgumentParser`. An argument that is unknown, missing or of the wrong
    type raises `ValueError`.
    """
    parser = _make_parser(argument_type, about)
    refuse_dangling_config(arguments)
    config, _ = _config_parser().parse_known_args(arguments)
    if config.config is not None:
        _set_defaults(parser, argument_type, config.config)
    named, unknown = parser.parse_known_args(arguments)
    refuse_unknown(unknown, parser._option_string_actions)
    return argument_type(**{item.name: getattr(named, item.name) for item in fields(argument_type)})


def peek(arguments: Sequence[str], *names: str) -> list[str | None]:
    """Return the values of a few flags, or else of a `--config` file, without parsing the others."""
    parser = OneLineErrors(parents=[_config_parser()], add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    named, _ = parser.parse_known_args(arguments)
    config = {} if named.config is None else _read_config(named.config)
    return [config.get(name) if getattr(named, name) is None else getattr(named, name) for name in names]


def refuse_unknown(arguments: Sequence[str], known: Collection[str], source: str = "") -> None:
    """Raise a `ValueError` for the first argument, with the known flag that looks most like it."""
    if arguments:
        name = arguments[0].partition("=")[0]
        close = get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]}?" if close else "--help lists the arguments."
        raise ValueError(f"{source}no argument is called {name}. {hint}")


def refuse_dangling_config(arguments: Sequence[str]) -> None:
    """Raise a `ValueError` if `--config` has no file."""
    if arguments and arguments[-1] == "--config":
        raise ValueError("--config needs a YAML file.")


def _config_parser() -> ArgumentParser:
    parser = OneLineErrors(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with arguments; flags override it.")
    return parser


def _make_parser(argument_type: type[CommandArguments], about: dict[str, Any]) -> ArgumentParser:
    parser = OneLineErrors(parents=[_config_parser()], allow_abbrev=False, formatter_class=HelpFormatter, **about)
    hints = get_type_hints(argument_type)
    for item in fields(argument_type):
        options: dict[str, Any] = {"help": item.metadata["help"]}
        if item.default is MISSING:
            parser.add_argument(item.name, metavar=item.name.upper(), **options)
            continue
        if "positional" in item.metadata:
            parser.add_argument(item.name, metavar=item.name.upper(), nargs="?", default=item.default, **options)
            continue
        kind = next(kind for kind in (*get_args(hints[item.name]), hints[item.name]) if kind is not NoneType)
        options |= {"dest": item.name, "default": item.default, "type": _to_bool if kind is bool else kind}
        options |= {"nargs": "?", "const": True} if kind is bool else {}
        options |= {"choices": item.metadata["choices"]} if "choices" in item.metadata else {}
        names = dict.fromkeys([f"--{item.name}", f"--{item.name.replace('_', '-')}", *item.metadata.get("flags", [])])
        parser.add_argument(*names, **options)
    return parser


def _to_bool(text: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise ArgumentTypeError(f"expected true or false, got {text!r}")
    return values[text.lower()]


def _set_defaults(parser: ArgumentParser, argument_type: type[CommandArguments], path: str) -> None:
    """Take defaults from a YAML file, and environment variables from its `env`."""
    config = _read_config(path)
    os.environ.update({name: str(value) for name, value in config.pop("env", {}).items()})
    names = [item.name for item in fields(argument_type)]
    refuse_unknown([f"--{name}" for name in config if name not in names], [f"--{name}" for name in names], f"{path}: ")
    # As text, values are converted and checked like those of the command line.
    parser.set_defaults(**{name: None if value is None else str(value) for name, value in config.items()})
    for action in parser._actions:
        action.required = action.required and action.dest not in config


def _read_config(path: str) -> dict[str, Any]:
    with Path(path).open(encoding="utf-8") as file:
        config = yaml.safe_load(file)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a YAML mapping of arguments, got {type(config).__name__}.")
    return config
