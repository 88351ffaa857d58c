"""
Rows of a dataset that cannot be trained: all named in one error, or left out and counted.

Here, as in the setting `bad_rows` and in every message to the user, the rows are the examples that a dataset holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from transformers import logging

from ..rendering.conversation import RenderingError


logger = logging.get_logger(__name__)

Example = TypeVar("Example")
Value = TypeVar("Value")
_ROWS_NAMED = 10
_ISSUES = "https://github.com/trl-singlepass/trl-singlepass/issues"
_EXCERPT = 80  # characters of a row of a stream, to find it by
_WAY_OUT = "bad_rows='drop' trains without such rows and counts them in the log."


class BadRows(StrEnum):
    """What happens to rows that cannot be trained."""

    ERROR = "error"
    """One error names them all; in a stream, the first one stops it."""
    DROP = "drop"
    """They are left out and counted."""


class BadRowError(RenderingError):
    """A row that cannot be trained and may be left out."""


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun: "1 turn", "1,000 turns"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class RowErrors:
    """Rows that cannot be trained for the same reason."""

    count: int
    rows: tuple[int, ...]  # indices of the first few of them in the dataset
    reason: str  # what is wrong with the first one

    def __str__(self) -> str:
        if self.count == 1:
            return f"Row {self.rows[0]}: {self.reason}"
        more = f" and {self.count - len(self.rows)} more" if self.count > len(self.rows) else ""
        return f"{self.count} rows ({', '.join(map(str, self.rows))}{more}), the first: {self.reason}"


def group_errors(reasons: Iterable[tuple[int, str]]) -> tuple[RowErrors, ...]:
    """Group bad rows, each with its index, by reason; reasons that differ only in names and numbers are one."""
    groups: dict[str, RowErrors] = {}
    for index, reason in reasons:
        _add_error(groups, index, reason)
    return _by_size(groups)


def _add_error(groups: dict[str, RowErrors], index: int, reason: str) -> None:
    kind = mask_details(reason)
    group = groups.get(kind, RowErrors(0, (), reason))
    groups[kind] = replace(group, count=group.count + 1, rows=(*group.rows, index)[:_ROWS_NAMED])


def _by_size(groups: Mapping[str, RowErrors]) -> tuple[RowErrors, ...]:
    return tuple(sorted(groups.values(), key=lambda group: group.count, reverse=True))


class UnexpectedError(RuntimeError):
    """A fault of the package that an example brought to light."""


def unexpected_error(error: Exception, index: int) -> UnexpectedError:
    """Return the error that asks to report a fault of the package."""
    return UnexpectedError(
        f"Row {index}: unexpected {type(error).__name__} ({error}). The fault is in trl-singlepass, not in the row: "
        f"please report it with the row and the chat template at {_ISSUES}. To go on without the row, remove it from "
        "the dataset."
    )


def get_reason(error: Exception, index: int | None = None) -> str:
    """Return why a row cannot be trained, without its index."""
    return str(error).removeprefix(f"Row {index}: ")


def bad_rows_error(errors: Sequence[RowErrors], num_rows: int, name: str) -> RenderingError:
    """Return the error that names all bad rows of a dataset."""
    lines = "".join(f"\n- {error}" for error in errors)
    count = sum(error.count for error in errors)
    way_out = _WAY_OUT if count < num_rows else "No other row is left to train. Repair the dataset."
    return RenderingError(
        f"{count} of {count_of(num_rows, 'row')} of the {name} dataset cannot be trained:{lines}\n{way_out}"
    )


def read_all(rows: Sequence[Example], read: Callable[[int, Example], Value], name: str) -> list[Value]:
    """Call `read` with index and value of every row; a `RenderingError` names all rows for which it raised one."""
    values, reasons = [], []
    for index, row in enumerate(rows):
        try:
            values.append(read(index, row))
        except RenderingError as error:
            reasons.append((index, get_reason(error, index)))
    if reasons:
        raise bad_rows_error(group_errors(reasons), len(rows), name)
    return values


class StreamLog:
    """
    Logs what a stream has lost so far whenever it has doubled.

    A stream may have no end at which to sum up what is lost, and a line per loss would flood the log.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._next = 1

    def update(self, lost: int, summary: object) -> None:
        """Log a summary, which becomes text only then, if twice as much is lost (in any unit) as at the last one."""
        if lost >= self._next:
            logger.warning(f"Stream of the {self._name} dataset so far: {summary}.")
            self._next = 2 * lost


class StreamedBadRows:
    """Bad rows of a stream, as they come: the first one stops it, or they are left out and logged."""

    def __init__(self, bad_rows: BadRows, name: str) -> None:
        self._bad_rows, self._name = bad_rows, name
        self._groups: dict[str, RowErrors] = {}  # their size does not grow with the stream
        self._log = StreamLog(name)

    def add(self, index: int, row: object, error: BadRowError) -> None:
        """Count a bad row, or raise `BadRowError`; `index` counts what this process reads of the stream."""
        reason = get_reason(error, index)
        if self._bad_rows == BadRows.ERROR:
            shown = repr(row)
            shown = shown if len(shown) <= _EXCERPT else f"{shown[:_EXCERPT]}…"
            raise BadRowError(
                f"Row {index}: {reason}\nIt is a row of the stream of the {self._name} dataset, counted as it is "
                f"read: {shown}\n{_WAY_OUT}"
            ) from error
        _add_error(self._groups, index, reason)
        count = sum(group.count for group in self._groups.values())
        self._log.update(count, describe_dropped(_by_size(self._groups)))


def describe_dropped(errors: Sequence[RowErrors]) -> str:
    """Return what the log says about bad rows that were left out."""
    count = sum(error.count for error in errors)
    reasons = "; ".join(str(error).rstrip(".") for error in errors)
    return f"{count_of(count, 'bad row')} dropped ({reasons})"


def mask_details(reason: str) -> str:
    """Replace what differs from row to row: names, numbers, quoted values and how many of them there are."""
    reason = re.sub(r"^Message \d+ cannot be rendered with the [^:]*: ", "", reason)
    reason = re.sub(r"(with the roles): [^.]*", r"\1: …", reason)
    reason = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "…", reason)
    return re.sub(r"…(, …)+", "…", reason)
