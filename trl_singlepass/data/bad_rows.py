"""Rows of a dataset that cannot be trained: all named in one error, or left out and counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import logging

from ..rendering.conversation import RenderingError
from .settings import BadRows


logger = logging.get_logger(__name__)

T = TypeVar("T")
_ROWS_NAMED = 10
_EXCERPT = 80  # characters of a row of a stream, by which to find it


class BadRowError(RenderingError):
    """A row that cannot be trained, and may be left out."""


@dataclass(frozen=True, slots=True)
class RowErrors:
    """
    Rows that cannot be trained for the same reason.

    Args:
        count (`int`):
            Number of rows.
        rows (`tuple[int, ...]`):
            Positions of the first of them in the dataset.
        reason (`str`):
            The error of the first one.
    """

    count: int
    rows: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        if self.count == 1:
            return f"Row {self.rows[0]}: {self.reason}"
        more = f" and {self.count - len(self.rows)} more" if self.count > len(self.rows) else ""
        return f"{self.count} rows ({', '.join(map(str, self.rows))}{more}), the first: {self.reason}"


def group_errors(reasons: Iterable[tuple[int, str]]) -> tuple[RowErrors, ...]:
    """
    Return the reasons of bad rows, those that differ in names and numbers only as one, the most frequent first.

    Args:
        reasons (`Iterable[tuple[int, str]]`):
            Position and reason of each bad row.

    Returns:
        `tuple[RowErrors, ...]`: The groups.
    """
    groups: dict[str, list[tuple[int, str]]] = {}
    for index, reason in reasons:
        groups.setdefault(_kind(reason), []).append((index, reason))
    by_size = sorted(groups.values(), key=len, reverse=True)
    return tuple(RowErrors(len(g), tuple(index for index, _ in g[:_ROWS_NAMED]), g[0][1]) for g in by_size)


def reason_of(error: Exception, index: int | None = None) -> str:
    """Return why a row cannot be trained, without its position."""
    reason = str(error) if isinstance(error, ValueError) else f"it cannot be read ({type(error).__name__}: {error})."
    return reason.removeprefix(f"Row {index}: ")


def refusal(errors: Sequence[RowErrors], num_rows: int, name: str) -> RenderingError:
    """Return the error that names all bad rows of a dataset."""
    lines = "".join(f"\n- {error}" for error in errors)
    count = sum(error.count for error in errors)
    return RenderingError(f"{count} of {num_rows} rows of the {name} dataset cannot be trained:{lines}\n{_WAY_OUT}")


_WAY_OUT = "bad_rows='drop' trains without such rows and counts them in the log."


def each_row(rows: Sequence[T], read: Callable[[int, T], Any], name: str) -> list[Any]:
    """
    Return what is read from each row, or refuse all bad rows at once.

    Args:
        rows (`Sequence`):
            Rows.
        read (`Callable`):
            Function of a row's position and the row.
        name (`str`):
            What the rows are called in the error.

    Returns:
        `list`: One value per row.

    Raises:
        `RenderingError`: If `read` refuses a row.
    """
    values, reasons = [], []
    for index, row in enumerate(rows):
        try:
            values.append(read(index, row))
        except RenderingError as error:
            reasons.append((index, reason_of(error, index)))
    if reasons:
        raise refusal(group_errors(reasons), len(rows), name)
    return values


class StreamedBadRows:
    """
    Bad rows of a stream, as they come: the first one stops it, or they are left out and logged each time that they
    have doubled.

    Args:
        bad_rows (`str`):
            `"error"` or `"drop"`.
        name (`str`):
            Name of the dataset.
    """

    def __init__(self, bad_rows: BadRows, name: str) -> None:
        self._bad_rows, self._name = bad_rows, name
        self._reasons: list[tuple[int, str]] = []
        self._next_log = 1

    def add(self, index: int, row: Any, error: BadRowError) -> None:
        """
        Note a bad row.

        Args:
            index (`int`):
                Its position in what this process reads of the stream.
            row (`Any`):
                The row.
            error (`BadRowError`):
                Why it cannot be trained.

        Raises:
            `BadRowError`: If bad rows are refused.
        """
        reason = reason_of(error, index)
        if self._bad_rows == "error":
            shown = repr(row)
            shown = shown if len(shown) <= _EXCERPT else f"{shown[:_EXCERPT]}…"
            raise BadRowError(
                f"Row {index}: {reason}\nIt is a row of the stream of the {self._name} dataset, counted as it is "
                f"read: {shown}\n{_WAY_OUT}"
            ) from error
        self._reasons.append((index, reason))
        if len(self._reasons) >= self._next_log:
            logger.warning(f"Stream of the {self._name} dataset so far: {dropped(group_errors(self._reasons))}.")
            self._next_log = 2 * len(self._reasons)


def dropped(errors: Sequence[RowErrors]) -> str:
    """Return what a log says of bad rows that were left out."""
    count = sum(error.count for error in errors)
    reasons = "; ".join(str(error).rstrip(".") for error in errors)
    return f"{count} bad {'row' if count == 1 else 'rows'} dropped ({reasons})"


def _kind(reason: str) -> str:
    """Reason without what differs from row to row: names, numbers, quoted values and how many of them there are."""
    reason = re.sub(r"^Message \d+ cannot be rendered with the [^:]*: ", "", reason)
    reason = re.sub(r"(with the roles): [^.]*", r"\1: …", reason)
    reason = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "…", reason)
    return re.sub(r"…(, …)+", "…", reason)
