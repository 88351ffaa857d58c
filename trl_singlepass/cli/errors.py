"""Errors as the command line shows them: whole, in one line, or in one for each reason why data cannot be trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

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


def describe_error(error: BaseException, find_flags: Callable[[], Collection[str]] = tuple) -> str:
    """
    Return the whole text of an error, with its type unless it is a `ValueError`.

    A `DataError` keeps its lines, every other error is one. `find_flags` returns the flags of the command: settings
    that the error names are spelt like them (`--bad_rows drop`). It is called only where there is one.
    """
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    # A worker of a DataLoader puts its traceback first.
    text = str(error).rpartition(f"\n{type(error).__module__}.{type(error).__qualname__}: ")[2]
    lines = text.splitlines() if isinstance(error, DataError) else [text]
    whole = "\n".join(line for line in (" ".join(line.split()) for line in lines) if line) or type(error).__name__
    return kind + as_sentence(_SETTING.sub(lambda match: _as_typed(match, find_flags), whole))


def _as_typed(setting: re.Match[str], find_flags: Callable[[], Collection[str]]) -> str:
    name, word, value = setting.groups()
    return f"--{name} {word or value.lower()}" if f"--{name}" in find_flags() else setting[0]
