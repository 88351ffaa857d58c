"""The doctor's report as one table."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .report import DoctorReport, Measured, Verified


NAMES = {"npass_packed": "N-pass, packed", "single_pass": "single pass", "waves": "single pass in waves"}


def render_report(report: DoctorReport) -> Group:
    """Return the report for `rich` to print: what is installed, one table, and what is wrong."""
    table = Table(title="Forward and backward, checked and measured", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("turns", "schedule", "attention", "tokens", "launches", "seconds", "peak MiB", "speed-up", "bound"):
        table.add_column(name, justify="left" if name in ("schedule", "attention") else "right", no_wrap=True)
    for check in report.verified:
        table.add_row(*_check_cells(check), end_section=check is report.verified[-1])
    for one in report.measured:
        table.add_row(*_step_cells(one))
    complaints = [Text(f"- {complaint}") for complaint in report.complaints]
    verdict = Text("Nothing is wrong." if report.ok else f"{len(complaints)} to look at:", style="bold")
    return Group(_facts(report), table, verdict, *complaints)


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
        "seen to run": _operators(kernel.operators),
        **({"faster": kernel.faster} if kernel.faster else {}),
    }
    facts = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        facts.add_row(Text(name, style="bold"), Text(text))
    return facts


def _operators(names: tuple[str, ...] | None) -> str:
    if names is None:
        return "nothing: attention is compiled, or did not run"
    return ", ".join(names) or "no attention operator: matrix products"


def _check_cells(check: Verified) -> list[str]:
    outcome = "agrees" if check.ok else "DIFFERS"
    if check.failed:
        outcome = "failed"
    return [str(check.turns), f"verify, {check.dtype}: {outcome}", check.attn_implementation]


def _step_cells(one: Measured) -> list[str]:
    return [
        str(one.turns),
        NAMES[one.schedule] + (": failed" if one.failed else ""),
        one.attn_implementation,
        f"{one.tokens:,}",
        _or_blank(one.launches, "{:,}"),
        _or_blank(one.seconds, "{:.3f}"),
        _or_blank(None if one.peak_bytes is None else one.peak_bytes / 2**20, "{:,.0f}"),
        _or_blank(one.speedup, "{:.2f}"),
        _or_blank(one.bound, "{:.2f}"),
    ]


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
