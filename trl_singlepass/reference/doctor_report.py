"""What the doctor found: records that become JSON as they are, and a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..engine.check.report import TreeCheckReport
from .environment import Environment


NAMES = {"npass_packed": "N-pass, packed", "single_pass": "single pass", "waves": "single pass in waves"}


@dataclass(frozen=True, slots=True)
class Examined:
    """The model that was looked at."""

    name: str  # folder or hub id; "built-in" without one
    architecture: str  # class of the model
    num_layers: int  # layers that ran, the first of the model
    total_layers: int
    device: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """The attention kernel that the model runs on."""

    attn_implementation: str  # the model's choice
    tree_attention: str  # registered name of its tree attention
    reason: str
    faster: str | None  # how attention gets faster on this machine, and by how much


@dataclass(frozen=True, slots=True)
class Verified:
    """N-pass and the single pass compared in one precision."""

    dtype: str  # of the weights
    attn_implementation: str
    ok: bool
    found: str  # the verdict, or the error if it did not run
    check: TreeCheckReport | None  # the measured check; `None` if it did not run


@dataclass(frozen=True, slots=True)
class Measured:
    """One training step, forward and backward with gradient checkpointing."""

    turns: int  # of the conversation
    schedule: str  # a name of [`Schedule`]
    attn_implementation: str
    tokens: int  # of the row
    seconds: float | None  # the best of a few
    peak_bytes: int | None  # above what was in use before the step
    speedup: float | None  # seconds of packed N-pass ÷ these
    bound: float | None  # counted operations of N-pass ÷ those of this schedule, if the model's can be counted
    failed: str | None  # error, if it did not run


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What the doctor found."""

    environment: Environment
    model: Examined
    kernel: Kernel
    verified: tuple[Verified, ...]  # by precision
    measured: tuple[Measured, ...]  # by conversation and schedule

    @property
    def complaints(self) -> tuple[str, ...]:
        """What is wrong: known problems, disagreement with N-pass, and steps that did not run."""
        differing = (
            f"verify in {one.dtype} on {one.attn_implementation}: {one.found}" for one in self.verified if not one.ok
        )
        failed = (f"{one.schedule}, {one.turns} turns: {one.failed}" for one in self.measured if one.failed)
        return (*self.environment.problems, *differing, *failed)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.complaints

    def to_dict(self) -> dict[str, object]:
        """Return the report as JSON can hold it."""
        return {**asdict(self), "complaints": list(self.complaints), "ok": self.ok}

    def __rich__(self) -> Group:
        table = Table(title="Forward and backward, checked and measured", box=box.SIMPLE_HEAD, title_justify="left")
        for name in ("turns", "schedule", "attention", "tokens", "seconds", "peak MiB", "speed-up", "bound"):
            table.add_column(name, justify="left" if name in ("schedule", "attention") else "right", no_wrap=True)
        for check in self.verified:
            table.add_row(*_check_cells(check), end_section=check is self.verified[-1])
        for one in self.measured:
            table.add_row(*_step_cells(one))
        complaints = [Text(f"- {complaint}") for complaint in self.complaints]
        verdict = Text("Nothing is wrong." if self.ok else f"{len(complaints)} to look at:", style="bold")
        return Group(_facts(self), table, verdict, *complaints)


def _facts(report: DoctorReport) -> Table:
    found, model, kernel = report.environment, report.model, report.kernel
    gpus = ", ".join(f"{gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]})" for gpu in found.gpus) or "no GPU"
    installed = ", ".join(f"{name} {number}" for name, number in found.packages.items() if number)
    missing = ", ".join(name for name, number in found.packages.items() if not number)
    part = "all" if model.num_layers == model.total_layers else f"the first {model.num_layers} of"
    rows = {
        "machine": f"{found.system}, {gpus}, driver {found.driver or 'none'}, CUDA {found.cuda or 'none'}",
        "installed": f"Python {found.python}, {installed}",
        "missing": missing or "nothing",
        "model": f"{model.name}: {model.architecture}, {part} {model.total_layers} layers, on {model.device}",
        "kernel": f"{kernel.attn_implementation} as {kernel.tree_attention}: {kernel.reason}",
        **({"faster": kernel.faster} if kernel.faster else {}),
    }
    facts = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        facts.add_row(Text(name, style="bold"), Text(text))
    return facts


def _check_cells(check: Verified) -> list[str]:
    outcome = "agrees" if check.ok else "failed" if check.check is None else "DIFFERS"
    return ["", f"verify, {check.dtype}: {outcome}", check.attn_implementation]


def _step_cells(one: Measured) -> list[str]:
    return [
        str(one.turns),
        NAMES[one.schedule] + (": failed" if one.failed else ""),
        one.attn_implementation,
        f"{one.tokens:,}",
        _or_blank(one.seconds, "{:.3f}"),
        _or_blank(None if one.peak_bytes is None else one.peak_bytes / 2**20, "{:,.0f}"),
        _or_blank(one.speedup, "{:.2f}"),
        _or_blank(one.bound, "{:.2f}"),
    ]


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
