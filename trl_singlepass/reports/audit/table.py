"""An audit as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .counts import TurnStats
from .facts import AuditFacts
from .findings import get_findings
from .forecast import Forecast, Schedule


MAX_TURNS_SHOWN = 12
WIDTH = 118


def format_report(report: AuditFacts) -> str:
    """Return an audit as text with lines of at most 118 characters."""
    text = StringIO()
    Console(file=text, width=WIDTH).print(render_report(report))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip() + "\n"


def render_report(report: AuditFacts) -> RenderableType:
    """Return an audit for `rich` to print. Text from the dataset appears literally."""
    parts: list[RenderableType] = [Text(headline(report), style="bold"), *tables(report)]
    lines = Text("\n".join(f"• {finding}" for finding in get_findings(report)))
    parts += [Text("Findings", style="bold"), Padding(lines, (0, 0, 0, 2))]
    if report.forecast is not None:
        parts += [Text(""), Text(report.forecast.verdict, style="bold")]
    return Group(*parts)


def tables(report: AuditFacts) -> list[Table]:
    """Return the tables of an audit that have something to show."""
    parts = [_error_table(report)] if report.errors else []
    if report.all_turns.turns or report.all_turns.trainable:
        parts.append(_size_table(report))
    if report.all_turns.turns:
        parts += [_template_table(report), _kind_table(report)]
    if report.forecast is not None:
        parts += [_recipe_table(report), _forecast_table(report, report.forecast)]
    return parts


def headline(report: AuditFacts) -> str:
    """Return what was audited, in one line."""
    if report.num_rows is None:
        audited = f"the first {report.num_audited:,} rows of a stream"
    elif report.num_audited < report.num_rows:
        audited = f"{report.num_audited:,} rows drawn at random from {report.num_rows:,}"
    else:
        audited = f"{report.num_rows:,} rows"
    policies = ", ".join(dict.fromkeys(facts.kind for facts, _ in report.templates)) or "not rendered"
    names = ", ".join(dict.fromkeys(facts.name for facts, _ in report.templates)) or "chat template"
    num_turns = max(report.all_turns.turns, report.all_turns.trainable)
    return f"{audited}, {num_turns:,} turns; {names}: reasoning {policies}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", vertical="bottom")
    return table


def _error_table(report: AuditFacts) -> Table:
    table = Table(title="Rows that cannot be trained", title_justify="left", title_style="bold")
    for name in ("rows", "first rows", "reason"):
        table.add_column(name, overflow="fold")
    for error in report.errors[:10]:
        table.add_row(str(error.count), ", ".join(map(str, error.rows)), Text(_clip(error.reason, 400)))
    return table


def _size_table(report: AuditFacts) -> Table:
    names = ("turn", "turns", "prompt", "reasoning", "answer", "over max_length", "followed", "branch off")
    return _table_by_turn(_table("Turns, with the mean number of tokens of each part", *names), report, _size_cells)


def _size_cells(stats: TurnStats) -> list[str]:
    tokens = (stats.prompt_tokens, stats.reasoning_tokens, stats.answer_tokens)
    return [
        f"{max(stats.turns, stats.trainable):,}",
        *(f"{total / stats.trainable:,.0f}" if stats.trainable else "–" for total in tokens),
        *(f"{n:,}" for n in (stats.over_max_length, stats.followed, sum(stats.branches.values()))),
    ]


_TEMPLATE_COLUMNS: dict[str, Callable[[TurnStats], int]] = {
    "reasoning\ntrained": lambda stats: stats.reasoning_found,
    "put\nback": lambda stats: stats.reasoning_restored,
    "other\nkey": lambda stats: stats.reasoning_under_other_key,
    "lost": lambda stats: stats.reasoning_lost,
    "hidden\nlater": lambda stats: stats.reasoning_hidden,
    "tool\ncalls": lambda stats: stats.with_calls,
    "calls\nlost": lambda stats: stats.calls_lost,
    "stop\nadded": lambda stats: stats.stop_added,
    "not a token\nprefix": lambda stats: stats.not_token_prefix,
    "prompt\nchanged": lambda stats: stats.prompt_changed,
}


def _template_table(report: AuditFacts) -> Table:
    table = _table("Turns, by what the template does to them", "turn", *_TEMPLATE_COLUMNS)
    return _table_by_turn(table, report, lambda stats: [f"{count(stats):,}" for count in _TEMPLATE_COLUMNS.values()])


def _table_by_turn(table: Table, report: AuditFacts, cells: Callable[[TurnStats], list[str]]) -> Table:
    """Add a row for each of the first turns, and one for all turns."""
    for stats in report.by_turn[:MAX_TURNS_SHOWN]:
        table.add_row(str(stats.turn), *cells(stats))
    table.add_section()
    table.add_row("all", *cells(report.all_turns), style="bold")
    return table


def _kind_table(report: AuditFacts) -> Table:
    table = _table("Turns by kind of completion", "completion", "turns", "of all turns")
    for kind, count in report.all_turns.kinds.items():
        table.add_row(kind, f"{count:,}", _percent(count, report.all_turns.turns))
    return table


def _recipe_table(report: AuditFacts) -> Table:
    table = _table(
        "What other recipes would train of the same conversations",
        "recipe",
        "conversations",
        "tokens\ntrained",
        "of completions",
        "context unlike\ninference",
        "reasoning\nnot trained",
    )
    for recipe in report.recipes:
        if recipe.conversations == 0:
            table.add_row(recipe.name, "0", *["–"] * 4)
            continue
        table.add_row(
            recipe.name,
            f"{recipe.conversations:,}",
            f"{recipe.trained_tokens:,}",
            _percent(recipe.trained_tokens, recipe.completion_tokens),
            _percent(recipe.unlike_inference, recipe.trained_tokens),
            _percent(recipe.reasoning_not_trained, recipe.reasoning_tokens),
        )
    return table


def _forecast_table(report: AuditFacts, forecast: Forecast) -> Table:
    scale = report.num_rows / report.num_audited if report.num_rows else 1.0
    about = "≈ " if scale > 1 else ""
    table = _table(
        f"Forecast for one epoch; sharing factor {forecast.sharing_factor}",
        "schedule",
        "tokens",
        "attention pairs" if forecast.has_model else "pairs of a layer",
        *(["PFLOP"] if forecast.has_model else []),
        "N-pass ÷ this",
    )
    chains = f"{forecast.over_npass.value / forecast.over_chains.value:.2f}"
    gains = ["1.00", chains, str(forecast.over_npass), f"≥ {forecast.shared_over_npass}"]
    for schedule, gain in zip(Schedule, gains, strict=True):
        cost = forecast.costs[schedule]
        flops = [f"{about}{cost.flops * scale / 1e15:,.3g}"] if forecast.has_model else []
        counts = [f"{about}{cost.tokens * scale:,.0f}", f"{about}{cost.attention_pairs * scale:.3g}"]
        table.add_row(schedule, *counts, *flops, gain)
    return table


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
