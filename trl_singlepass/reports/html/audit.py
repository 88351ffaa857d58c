"""The audit of a dataset as a page: findings, plots and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from rich.table import Table
from rich.text import Text

from ..audit import AuditReport
from ..audit.turns import Lengths
from . import frame


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 460, 236, 46, 26, 42
_CHARACTER = 8.5  # pixels: in a narrow window, where a chart shrinks, its labels are larger


def audit_page(report: AuditReport, title: str) -> str:
    """Return a self-contained page with an audit, as HTML."""
    findings = "".join(f"<li>{escape(finding)}</li>" for finding in report.findings)
    verdict = f'<p class="verdict">{escape(report.forecast.verdict)}</p>' if report.forecast else ""
    body = f"""<header><h1>{escape(title)}</h1><p>{escape(report.headline)}</p>{verdict}</header>
<div class="page">
<section><h2>Findings</h2><ul>{findings}</ul></section>
<div class="plots">{"".join(_plots(report))}</div>
{"".join(_section(table) for table in report.tables)}
</div>"""
    return frame(title, body)


def _section(table: Table) -> str:
    """The terminal's table as HTML."""
    head = "".join(f"<th>{_text(column.header)}</th>" for column in table.columns)
    rows = zip(*(list(column.cells) for column in table.columns), strict=True)
    lines = []
    for cells, row in zip(rows, table.rows, strict=True):
        kind = ' class="total"' if row.style == "bold" else ""
        lines.append(f"<tr{kind}>{''.join(f'<td{_left(cell)}>{_text(cell)}</td>' for cell in cells)}</tr>")
    caption = f'<p class="hint">{_text(table.caption)}</p>' if table.caption else ""
    return (
        f'<section><h2>{_text(table.title)}</h2>{caption}<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></section>\n"
    )


def _text(cell: object) -> str:
    return escape(cell.plain if isinstance(cell, Text) else str(cell)).replace("\n", " ")


def _left(cell: object) -> str:
    return ' class="left"' if isinstance(cell, Text) else ""


def _plots(report: AuditReport) -> Iterable[str]:
    if report.sample_lengths is not None:
        yield _plot("Tokens per sample", "tokens", "samples", *_histogram(report.sample_lengths))
    if report.tree_lengths is not None:
        yield _plot("Tokens per tree", "tokens", "trees", *_histogram(report.tree_lengths))
    sharing = report.sharing_by_turns
    names, factors = [str(entry.num_turns) for entry in sharing], [entry.sharing_factor for entry in sharing]
    yield _plot("Sharing factor by number of turns", "turns", "sharing factor", factors, names, decimals=1)
    lost = [
        (recipe.name, 100 * recipe.reasoning_not_trained / recipe.reasoning_tokens)
        for recipe in report.recipes
        if recipe.conversations and recipe.reasoning_tokens
    ]
    shares, recipes = [share for _, share in lost], [name for name, _ in lost]
    yield _plot("Reasoning that other recipes leave untrained", "recipe", "% of reasoning tokens", shares, recipes)


def _histogram(lengths: Lengths) -> tuple[Sequence[float], Sequence[str]]:
    return lengths.counts, [f"{edge:,}" for edge in lengths.edges[:-1]]


def _plot(
    title: str, x_label: str, y_label: str, values: Sequence[float], names: Sequence[str], decimals: int = 0
) -> str:
    """A bar chart, unless there is only one bar. Bars are labelled at regular intervals, as often as labels fit."""
    if len(values) < 2:
        return ""
    top, step = max(*values, 0), (_WIDTH - _LEFT) / len(values)
    longest = max(map(len, names))
    every = max(1, round((longest * _CHARACTER + 8) / step + 0.49))
    height = _HEIGHT - _BOTTOM - _TOP
    parts = []
    for index, (value, name) in enumerate(zip(values, names, strict=True)):
        bar = height * value / top if top else 0
        x, y = _LEFT + index * step, _TOP + height - bar
        label = f"{escape(name)}: {value:,.{decimals}f}"
        parts.append(
            f'<rect class="bar" x="{x + 1:.1f}" y="{y:.1f}" width="{max(step - 2, 1):.1f}" height="{bar:.1f}">'
            f"<title>{label}</title></rect>"
        )
        if index % every == 0:
            parts.append(f'<text x="{x + step / 2:.1f}" y="{_HEIGHT - 26}" text-anchor="middle">{escape(name)}</text>')
    axis = (
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH}" y1="{_TOP + height}" y2="{_TOP + height}"/>'
        f'<text x="{_LEFT - 6}" y="{_TOP + 4}" text-anchor="end">{top:,.{decimals}f}</text>'
        f'<text x="0" y="10">{escape(y_label)}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>'
        f'<text x="{_LEFT - 6}" y="{_TOP + height}" text-anchor="end">0</text>'
    )
    label = escape(f"{title}: {len(values)} bars, the highest {top:,.{decimals}f}")
    return (
        f'<section><h2>{escape(title)}</h2><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}{axis}</svg></section>"
    )
