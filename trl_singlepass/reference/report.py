"""The report of `verify`: the comparison of the single pass with N-pass, by turn and by row, and its tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO

from rich.console import Console
from rich.table import Table

from ..data.bad_rows import count_of
from ..engine.check.tree_check import TreeCheckReport
from .single_pass import LeakReport


MAX_TURNS_SHOWN = 24


@dataclass(frozen=True, slots=True)
class TurnComparison:
    """Loss of one turn in N-pass and in the single pass."""

    row: int  # index of its conversation among those verified
    turn: int  # number of the turn in its conversation, from 1
    message_index: int | None  # position of the assistant message in its conversation
    num_tokens: int  # trained ones
    npass_loss: float  # weighted mean of the turn's token losses in its own forward
    single_pass_loss: float
    error: float  # largest difference between the losses of a token; NaN if a target is missing
    allowed: float  # largest error that the model's precision explains

    @property
    def ok(self) -> bool:
        """Whether the losses agree within the model's precision."""
        return self.error <= self.allowed


@dataclass(frozen=True, slots=True)
class RowComparison:
    """Loss and gradients of one conversation in N-pass and in the single pass."""

    turns: tuple[TurnComparison, ...]  # those with at least one trained token
    npass_loss: float  # mean over the conversation's trained tokens, plus the load-balancing loss if there is one
    single_pass_loss: float
    weight: float  # sum of the loss weights
    # norm of the difference between the gradients ÷ norm of N-pass's gradient, over all parameters
    gradient_error: float
    gradient_allowed: float  # largest such error that the model's precision explains
    gradient_max_error: float  # largest absolute difference between elements of the gradients
    worst_parameter: str  # the one with that difference
    npass_tokens: int
    single_pass_tokens: int
    npass_seconds: float  # wall time of forward and backward, after a warm-up
    single_pass_seconds: float
    leak: LeakReport  # which tokens the turns see

    @property
    def ok(self) -> bool:
        """Whether losses and gradient agree within the model's precision, and each turn sees only its sample."""
        return all(turn.ok for turn in self.turns) and self.gradient_error <= self.gradient_allowed and self.leak.ok


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """
    Comparison of the single pass with N-pass; `str()` of it is a table.

    Args:
        rows (`tuple[RowComparison, ...]`):
            One comparison per conversation of which something is trained.
        check (`TreeCheckReport`):
            The check that trainers make before their first step.
        dtype (`str`):
            Data type of the model's parameters.
        turns_left_out (`int`, *optional*, defaults to 0):
            Turns that were not compared because of `max_tokens`.
        rows_left_out (`int`, *optional*, defaults to 0):
            Conversations that were not compared because all their turns have the weight 0.
    """

    rows: tuple[RowComparison, ...]
    check: TreeCheckReport
    dtype: str
    turns_left_out: int = 0
    rows_left_out: int = 0

    @property
    def ok(self) -> bool:
        """Whether every conversation agrees within the model's precision."""
        return self.check.ok and all(row.ok for row in self.rows)

    @property
    def npass_loss(self) -> float:
        """Loss in N-pass over all trained tokens of all conversations."""
        return sum(row.npass_loss * row.weight for row in self.rows) / sum(row.weight for row in self.rows)

    @property
    def single_pass_loss(self) -> float:
        """Loss in the single pass over all trained tokens of all conversations."""
        return sum(row.single_pass_loss * row.weight for row in self.rows) / sum(row.weight for row in self.rows)

    @property
    def verdict(self) -> str:
        """Whether the single pass equals N-pass, and where it does not."""
        verdict = f"The single pass equals N-pass within the precision of {self.dtype}."
        if not self.ok:
            verdict = f"The single pass does NOT equal N-pass: {'; '.join(_differences(self))}."
        if self.turns_left_out:
            verdict += f" Not compared, beyond max_tokens: {count_of(self.turns_left_out, 'turn')}."
        if self.rows_left_out:
            verdict += f" Not compared, since nothing of it is trained: {count_of(self.rows_left_out, 'row')}."
        return verdict

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=110).print(_turn_table(self), _total_table(self), self.verdict, sep="\n")
        return text.getvalue()


def _turn_table(report: VerifyReport) -> Table:
    turns = [turn for row in report.rows for turn in row.turns]
    # Turns that differ come first: they are what the reader looks for.
    shown = sorted(sorted(turns, key=lambda turn: turn.ok)[:MAX_TURNS_SHOWN], key=lambda turn: turn.row)
    table = Table(title=f"Loss per turn ({len(shown)} of {len(turns)})")
    for name in ("row", "turn", "message", "tokens", "N-pass", "single pass", "error", "allowed", "result"):
        table.add_column(name, justify="right")
    for turn in shown:
        table.add_row(
            str(turn.row),
            str(turn.turn),
            "" if turn.message_index is None else str(turn.message_index),
            str(turn.num_tokens),
            f"{turn.npass_loss:.6f}",
            f"{turn.single_pass_loss:.6f}",
            f"{turn.error:.1e}",
            f"{turn.allowed:.1e}",
            "ok" if turn.ok else "DIFFERS",
        )
    return table


def _total_table(report: VerifyReport) -> Table:
    rows = report.rows
    npass_tokens, tokens = sum(row.npass_tokens for row in rows), sum(row.single_pass_tokens for row in rows)
    npass_seconds, seconds = sum(row.npass_seconds for row in rows), sum(row.single_pass_seconds for row in rows)
    worst = max(rows, key=lambda row: row.gradient_max_error)
    table = Table(title="All conversations")
    for name in ("", "N-pass", "single pass", "comparison"):
        table.add_column(name, justify="left" if name in ("", "comparison") else "right")
    difference = abs(report.npass_loss - report.single_pass_loss)
    table.add_row("loss", f"{report.npass_loss:.6f}", f"{report.single_pass_loss:.6f}", f"difference {difference:.1e}")
    table.add_row("tokens", f"{npass_tokens}", f"{tokens}", f"sharing factor {npass_tokens / tokens:.2f}")
    table.add_row("seconds", f"{npass_seconds:.2f}", f"{seconds:.2f}", f"speed-up {npass_seconds / seconds:.2f}")
    relative = max(rows, key=lambda row: row.gradient_error / row.gradient_allowed)
    table.add_row(
        "gradient", "", "", f"{relative.gradient_error:.1e} relative, {relative.gradient_allowed:.1e} allowed"
    )
    table.add_row("", "", "", f"{worst.gradient_max_error:.1e} at most, in {worst.worst_parameter}")
    return table


def _differences(report: VerifyReport) -> Iterator[str]:
    if not report.check.ok:
        where = f" ({report.check.where})" if report.check.where else ""
        yield f"small row of the check: {report.check.reason}{where}"
    for row in report.rows:
        index = row.turns[0].row
        if row.leak.leaked > 0:
            yield f"row {index}: a turn sees tokens of another turn"
        if row.leak.blind > 0:
            yield f"row {index}: {row.leak.blind} tokens of a turn's own history have no effect on it"
        if not all(turn.ok for turn in row.turns):
            yield f"row {index}: losses differ"
        if not row.gradient_error <= row.gradient_allowed:
            yield f"row {index}: gradients differ"
