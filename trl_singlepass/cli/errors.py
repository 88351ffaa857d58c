"""Errors as the command line shows them: whole, in one line, or in one for each reason why data cannot be trained."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache, partial
from importlib import import_module

from ..scripts import SCRIPTS
from ..trees.errors import DataError, as_sentence


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


def describe_error(error: BaseException, command: str) -> str:
    """
    Return the whole text of an error, with its type unless it is a `ValueError`.

    A `DataError` keeps its lines, every other error is one. Settings that it names are spelt like the flags of the
    command, if that trains (`--bad_rows drop`).
    """
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    # A worker of a DataLoader puts its traceback first.
    text = str(error).rpartition(f"\n{type(error).__module__}.{type(error).__qualname__}: ")[2]
    lines = text.splitlines() if isinstance(error, DataError) else [text]
    whole = "\n".join(line for line in (" ".join(line.split()) for line in lines) if line) or type(error).__name__
    return kind + as_sentence(_SETTING.sub(partial(_as_typed, command), whole))


def _as_typed(command: str, setting: re.Match[str]) -> str:
    name, word, value = setting.groups()
    return f"--{name} {word or value.lower()}" if f"--{name}" in _flags_of(command) else setting[0]


@cache
def _flags_of(command: str) -> Collection[str]:
    """Return the flags of the script of a command: none if it has no script, which takes seconds to import."""
    if command not in SCRIPTS:
        return ()
    flags: Collection[str] = import_module(SCRIPTS[command]).make_parser()._option_string_actions
    return flags
