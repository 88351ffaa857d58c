"""An audit as tables for the terminal."""

from __future__ import annotations

from io import StringIO

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .counts import TurnStats
from .facts import AuditFacts
from .findings import findings_of
from .forecast import SCHEDULES


MAX_TURNS_SHOWN = 12
WIDTH = 118


def table_of(report: AuditFacts) -> str:
    """Return an audit as text of at most 118 columns."""
    console = Console(file=StringIO(), width=WIDTH)
    console.print(renderable_of(report))
    assert isinstance(console.file, StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip() + "\n"


def renderable_of(report: AuditFacts) -> RenderableType:
    """Return an audit as what `rich` prints. Text of the dataset is shown literally."""
    parts: list[RenderableType] = [Text(headline(report), style="bold"), *tables(report)]
    lines = Text("\n".join(f"• {finding}" for finding in findings_of(report)))
    parts += [Text("Findings", style="bold"), Padding(lines, (0, 0, 0, 2))]
    if report.forecast is not None:
        parts += [Text(""), Text(report.forecast.verdict, style="bold")]
    return Group(*parts)


def tables(report: AuditFacts) -> list[Table]:
    """Return the tables of an audit: those that have something to say."""
    parts = [_error_table(report)] if report.errors else []
    if report.all_turns.turns or report.all_turns.trainable:
        parts.append(_size_table(report))
    if report.all_turns.turns:
        parts += [_template_table(report), _kind_table(report)]
    if report.forecast is not None:
        parts += [_recipe_table(report), _forecast_table(report)]
    return parts


def headline(report: AuditFacts) -> str:
    """Return what was audited, in a line."""
    if report.num_rows is None:
        seen = f"the first {report.num_audited:,} rows of a stream"
    elif report.num_audited < report.num_rows:
        seen = f"{report.num_audited:,} rows drawn from {report.num_rows:,}"
    else:
        seen = f"{report.num_rows:,} rows"
    kinds = ", ".join(dict.fromkeys(facts.kind for facts, _ in report.templates)) or "not rendered"
    names = ", ".join(dict.fromkeys(facts.name for facts, _ in report.templates)) or "chat template"
    return f"{seen}, {max(report.all_turns.turns, report.all_turns.trainable):,} turns; {names}: reasoning {kinds}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", vertical="bottom")
    return table


def _error_table(report: AuditFacts) -> Table:
    table = Table(title="Rows that cannot be trained", title_justify="left", title_style="bold")
    for name in ("rows", "first ones", "reason of the first"):
        table.add_column(name, overflow="fold")
    for error in report.errors[:10]:
        table.add_row(str(error.count), ", ".join(map(str, error.rows)), Text(_clip(error.reason, 400)))
    return table


def _size_table(report: AuditFacts) -> Table:
    names = ("turn", "turns", "prompt", "reasoning", "answer", "over max_length", "followed", "branch off")
    table = _table("Turns, with the mean number of tokens of each part", *names)
    for stats in report.by_turn[:MAX_TURNS_SHOWN]:
        table.add_row(*_size_cells(stats))
    table.add_section()
    table.add_row(*_size_cells(report.all_turns), style="bold")
    return table


def _size_cells(stats: TurnStats) -> list[str]:
    tokens = (stats.prompt_tokens, stats.reasoning_tokens, stats.answer_tokens)
    return [
        "all" if stats.turn is None else str(stats.turn),
        f"{max(stats.turns, stats.trainable):,}",
        *(f"{total / stats.trainable:,.0f}" if stats.trainable else "–" for total in tokens),
        *(f"{n:,}" for n in (stats.over_max_length, stats.followed, sum(stats.branches.values()))),
    ]


def _template_table(report: AuditFacts) -> Table:
    names = (
        "turn",
        "reasoning\nfound",
        "put\nback",
        "other\nkey",
        "lost",
        "hidden\nlater",
        "tool\ncalls",
        "calls\nlost",
    )
    table = _table(
        "Turns, and what the template makes of them", *names, "stop\nadded", "no token\nprefix", "prompt\nchanged"
    )
    for stats in report.by_turn[:MAX_TURNS_SHOWN]:
        table.add_row(*_template_cells(stats))
    table.add_section()
    table.add_row(*_template_cells(report.all_turns), style="bold")
    return table


def _template_cells(stats: TurnStats) -> list[str]:
    reasoning = (
        stats.reasoning_found,
        stats.reasoning_restored,
        stats.reasoning_under_other_key,
        stats.reasoning_lost,
    )
    others = (stats.reasoning_hidden, stats.with_calls, stats.calls_lost)
    ends = (stats.stop_added, stats.not_token_prefix, stats.prompt_changed)
    return ["all" if stats.turn is None else str(stats.turn), *(f"{n:,}" for n in (*reasoning, *others, *ends))]


def _kind_table(report: AuditFacts) -> Table:
    table = _table("Turns, by how their completions came about", "completion", "turns", "of all turns")
    for kind, count in report.all_turns.kinds.items():
        table.add_row(kind, f"{count:,}", _percent(count, report.all_turns.turns))
    return table


def _recipe_table(report: AuditFacts) -> Table:
    table = _table(
        "What other recipes would do with the same conversations",
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


def _forecast_table(report: AuditFacts) -> Table:
    forecast = report.forecast
    assert forecast is not None
    scale = report.num_rows / report.num_audited if report.num_rows else 1.0
    about = "≈ " if scale > 1 else ""
    table = _table(
        f"Forecast of one epoch; sharing factor {forecast.sharing_factor}",
        "schedule",
        "tokens",
        "attention pairs" if forecast.has_model else "pairs of a layer",
        *(["PFLOP"] if forecast.has_model else []),
        "N-pass ÷ this",
    )
    gains = ["1.00", _gain(report), str(forecast.over_npass), f"≥ {forecast.shared_over_npass}"]
    for name, gain in zip(SCHEDULES, gains, strict=True):
        cost = forecast.costs[name]
        flops = [f"{about}{cost.flops * scale / 1e15:,.3g}"] if forecast.has_model else []
        counts = [f"{about}{cost.tokens * scale:,.0f}", f"{about}{cost.attention_pairs * scale:.3g}"]
        table.add_row(name, *counts, *flops, gain)
    return table


def _gain(report: AuditFacts) -> str:
    forecast = report.forecast
    assert forecast is not None
    return f"{forecast.over_npass.value / forecast.over_chains.value:.2f}"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
