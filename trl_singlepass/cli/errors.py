"""Errors as the command line shows them: in one line."""

from __future__ import annotations

from ..data.error_text import first_line


EXPLAINED = 2
"""Exit code of a process that has printed its error."""
INTERRUPTED = 130
"""Exit code of a process that Ctrl-C has ended, as shells have it."""
CUT_OFF = 141
"""Exit code of a process whose output nobody reads any more, as in `trl-singlepass recipes | head`."""
# What users can act on: wrong arguments, files, rows and models, and packages that are not installed.
USER_ERRORS = (ValueError, OSError, ImportError, NotImplementedError)


def describe_error(error: BaseException) -> str:
    """Return an error in one line, with its type unless it is a `ValueError`."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{first_line(error, 600)}"
