"""The help of `trl-singlepass train` and `dpo`: this package's settings and the flags of a first run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill


# Read as text: importing it would import TRL and PyTorch, which take seconds.
_ROOT = Path(__file__).parents[1]
_SHARED = _ROOT / "training" / "base_config.py"
CONFIGS = {"train": _ROOT / "training" / "config.py", "dpo": _ROOT / "preference" / "config.py"}
"""File of the configuration of each command that trains: the only class in it."""
_OF_TRL = {"train": "sft", "dpo": "dpo"}
_FIRST_RUN = {
    "model_name_or_path": "Folder or hub id of the model.",
    "dataset_name": "A .jsonl or .parquet file, a folder, or the hub id of a dataset.",
    "output_dir": "Folder for checkpoints and the trained model.",
    "config": "YAML file with arguments; flags override it.",
    "accelerate_config": "File, or name of a configuration that TRL ships, such as fsdp2 or zero3.",
    "num_processes": "Number of processes, one per GPU.",
    "resume_from_checkpoint": "Checkpoint to resume from; 'auto' finds the newest intact one.",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of [`SinglePassSFTConfig`] or [`SinglePassDPOConfig`]."""

    name: str
    default: str  # as the command line takes it
    help: str  # what it does


def read_settings(command: str) -> Iterator[Setting]:
    """Yield the settings of a command that this package adds to TRL's, or whose defaults it changes."""
    trees = (ast.parse(file.read_text("utf-8")) for file in (_SHARED, CONFIGS[command]))
    classes = (node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    for node in (node for config in classes for node in config.body):
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Call(keywords=keywords)):
                options = {keyword.arg: keyword.value for keyword in keywords}
                yield Setting(name, _read_default(options["default"]), _read_help(options["metadata"]))


def _read_help(node: ast.expr) -> str:
    assert isinstance(node, ast.Dict)
    # Another entry, such as `"choices": list(OverlongTurns)`, is not a literal.
    entries = zip(node.keys, node.values, strict=True)
    text: str = next(ast.literal_eval(value) for key, value in entries if key and ast.unparse(key) == "'help'")
    return text


def _read_default(node: ast.expr) -> str:
    # A member of a StrEnum is its name in lower case: `OverlongTurns.TRUNCATE` is "truncate".
    return node.attr.lower() if isinstance(node, ast.Attribute) else str(ast.literal_eval(node))


def format_train_help(command: str, summary: str, example: str) -> str:
    """Return the help of a command that trains: flags of a first run, settings of this package, where others are."""
    lines = [
        f"usage: trl-singlepass {command} [arguments]",
        "",
        f"{summary[0].upper()}{summary[1:]}.",
        "",
        "a first run:",
        *(_entry(name, text) for name, text in _FIRST_RUN.items()),
        "",
        "settings of this package:",
        *(_entry(item.name, f"{item.help} (default: {item.default})") for item in read_settings(command)),
        "",
        f"All arguments of `trl {_OF_TRL[command]}` and of `accelerate launch` work as well:",
        "--help_all lists the former, `accelerate launch --help` the latter.",
        "",
        f"example:\n  {example}",
    ]
    return "\n".join(lines)


def _entry(name: str, text: str) -> str:
    return f"  --{name}\n" + fill(text, width=100, initial_indent=" " * 8, subsequent_indent=" " * 8)
