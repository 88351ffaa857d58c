"""The scripts of the commands that train."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module


SCRIPTS = {"train": "trl_singlepass.scripts.sft", "dpo": "trl_singlepass.scripts.dpo"}
"""The script of each command that trains."""


def flags_of(command: str) -> Collection[str]:
    """Return the flags that the script of a command takes; none if it has no script."""
    flags: Collection[str] = ()
    if command in SCRIPTS:
        flags = import_module(SCRIPTS[command]).make_parser()._option_string_actions
    return flags
