"""
Arguments of the commands, on TRL's parser.

A field of a dataclass is a flag, or, without `init`, a positional argument; its metadata are for `add_argument`.
"""

from __future__ import annotations

from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

from trl.scripts.utils import TrlParser  # without PyTorch, which takes seconds


_ATTENTION_HELP = "Attention implementation of the model."
_DEVICE_HELP = "Device to run on; a GPU by default if there is one."
_JSON_HELP = "File to write the report to as JSON; '-' prints it."


@dataclass
class CommandArguments:
    """Arguments of a command that loads a model, or a part of it."""

    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether code that comes with the model may run on this machine."}
    )
    debug: bool = field(default=False, metadata={"help": "Show the traceback of an error."})


@dataclass
class TokenizerArguments(CommandArguments):
    """The model, and how its tokenizer renders."""

    model: str = field(
        init=False, metadata={"help": "Folder or hub id of a model; `inspect` reads its tokenizer only."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "File with a chat template to use instead of the tokenizer's own."}
    )


@dataclass
class DataArguments(TokenizerArguments):
    """The conversations."""

    data: str = field(
        init=False, metadata={"help": "A .jsonl or .parquet file, a folder, or the hub id of a dataset."}
    )
    split: str = field(default="train", metadata={"help": "Split of a folder or of a dataset on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})


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
    json: str | None = field(default=None, metadata={"help": _JSON_HELP})
    html: str | None = field(default=None, metadata={"help": "File to write the report to as a page with plots."})


@dataclass
class ModelArguments(DataArguments):
    """How to load and run the model."""

    num_rows: int = field(default=4, metadata={"aliases": ["-n"], "help": "Number of conversations, from the first."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Data type of the weights.", "choices": ["float64", "float32", "bfloat16", "float16"]},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": _ATTENTION_HELP})
    device: str | None = field(default=None, metadata={"help": _DEVICE_HELP})


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
        init=False, metadata={"nargs": "?", "help": "Folder or hub id of a model; a small one by default."}
    )
    turns: str = field(default="2,8,16", metadata={"help": "Lengths of the conversations to time, in turns."})
    attn_implementation: str | None = field(default=None, metadata={"help": _ATTENTION_HELP})
    device: str | None = field(default=None, metadata={"help": _DEVICE_HELP})
    json: str | None = field(default=None, metadata={"help": _JSON_HELP})


@dataclass
class ChatArguments(TokenizerArguments):
    """Arguments of `chat`."""

    history: str = field(
        default="template",
        metadata={
            "help": "What contexts show of earlier turns, as in training.",
            "choices": ["template", "keep", "strip"],
        },
    )
    system: str | None = field(default=None, metadata={"help": "System prompt."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Largest number of tokens of a reply."})
    device: str | None = field(default=None, metadata={"help": _DEVICE_HELP})


Arguments = TypeVar("Arguments", bound=CommandArguments)


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults other than `None`, and examples as they are written."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(TrlParser):  # type: ignore[misc]
    """TRL's parser with positional arguments, whole flags, and errors in one line: usage would fill the screen."""

    def __init__(self, dataclass_types: Iterable[type] = (), /, **about: Any) -> None:
        types = list(dataclass_types)
        super().__init__(types, allow_abbrev=False, formatter_class=HelpFormatter, **about)
        for item in (item for kind in types for item in fields(kind) if not item.init):
            self.add_argument(item.name, **{"metavar": item.name.upper(), **item.metadata})
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


class _CommandParser(Parser):
    """Converts and checks the values of a `--config` file like those of the command line."""

    def set_defaults_with_config(self, **config: object) -> list[str]:
        """Take defaults as text."""
        texts = {name: value if value is None else str(value) for name, value in config.items()}
        left: list[str] = super().set_defaults_with_config(**texts)
        return left


def parse_arguments(argument_type: type[Arguments], arguments: Sequence[str], **about: str) -> Arguments:
    """
    Parse the arguments of a command to an object of `argument_type`.

    Arguments of the command line override those of a `--config` file; `about` goes to `argparse.ArgumentParser`. An
    argument that is unknown, missing or of the wrong type raises `ValueError`.
    """
    (parsed, positional), *_ = _CommandParser([argument_type], **about).parse_divided(arguments)
    for item in fields(argument_type):
        if not item.init:
            setattr(parsed, item.name, getattr(positional, item.name))
    args: Arguments = parsed
    return args


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


def with_config_apart(arguments: Sequence[str]) -> list[str]:
    """Return arguments with `--config FILE` as two words, as TRL's parser reads it; no file raises `ValueError`."""
    if arguments and arguments[-1] == "--config":
        raise ValueError("--config needs a YAML file.")
    return [
        word for given in arguments for word in (given.split("=", 1) if given.startswith("--config=") else [given])
    ]
