"""An audit as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from math import isnan, nan

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ...trees.sample import CompletionKind
from ..wording import count_of
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
    parts: list[RenderableType] = [Text(headline(report), style="bold")]
    if report.forecast is not None:
        parts.append(Text(report.forecast.verdict))
    lines = Text("\n".join(f"• {finding}" for finding in get_findings(report)))
    parts += [Text("\nFindings", style="bold"), Padding(lines, (0, 0, 1, 2))]
    for table in tables(report):
        caption, table.caption = table.caption, None  # which rich would wrap to the width of the table
        parts += [table, Text(f"{caption}\n", style="dim")] if caption else [table]
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
        audited = f"the first {count_of(report.num_audited, 'row')} of a stream"
    elif report.num_audited < report.num_rows:
        audited = f"{count_of(report.num_audited, 'row')} drawn at random from {report.num_rows:,}"
    else:
        audited = count_of(report.num_rows, "row")
    policies = ", ".join(dict.fromkeys(facts.kind for facts, _ in report.templates)) or "not rendered"
    names = ", ".join(dict.fromkeys(facts.name for facts, _ in report.templates)) or "chat template"
    num_turns = max(report.all_turns.turns, report.all_turns.trainable)
    return f"{audited}, {count_of(num_turns, 'turn')}; {names}: reasoning {policies}"


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


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of a table by turn: what it says of a turn, and what its heading means."""

    heading: str
    value: Callable[[TurnStats], int | float]
    meaning: str


def _mean(count: Callable[[TurnStats], int]) -> Callable[[TurnStats], float]:
    return lambda stats: count(stats) / stats.trainable if stats.trainable else nan


_SIZES = (
    _Column("turns", lambda stats: max(stats.turns, stats.trainable), "conversations that have this turn"),
    _Column("prompt", _mean(lambda stats: stats.prompt_tokens), "the context"),
    _Column("reasoning", _mean(lambda stats: stats.reasoning_tokens), "with its closing tag"),
    _Column("answer", _mean(lambda stats: stats.answer_tokens), "the rest of the completion, tool calls included"),
    _Column("too long", lambda stats: stats.over_max_length, "longer than max_length"),
    _Column("followed", lambda stats: stats.followed, "another turn follows"),
    _Column("branch off", lambda stats: sum(stats.branches.values()), "the next prompt does not begin with this turn"),
)
_TEMPLATE_EFFECTS = (
    _Column("reasoning\ntrained", lambda stats: stats.reasoning_found, "turns whose reasoning is trained"),
    _Column("put\nback", lambda stats: stats.reasoning_restored, "reasoning that the template leaves out"),
    _Column("other\nkey", lambda stats: stats.reasoning_under_other_key, "reasoning that the template does not read"),
    _Column("lost", lambda stats: stats.reasoning_lost, "reasoning that cannot be rendered"),
    _Column("hidden\nlater", lambda stats: stats.reasoning_hidden, "reasoning that the next turn does not see"),
    _Column("tool\ncalls", lambda stats: stats.with_calls, "turns that call tools"),
    _Column("calls\nlost", lambda stats: stats.calls_lost, "a tool call or part of one is not rendered"),
    _Column("stop\nadded", lambda stats: stats.stop_added, "the template writes no stop token"),
    _Column("not a token\nprefix", lambda stats: stats.not_token_prefix, "the prompt is a prefix as text only"),
    _Column("prompt\nchanged", lambda stats: stats.prompt_changed, "rendered differently once the answer follows"),
)


_KINDS: dict[str, str] = {
    CompletionKind.AS_SERVED: "the template's rendering continues the prompt",
    CompletionKind.HISTORY_REWRITTEN: "the template rewrites earlier messages once this one is there",
    CompletionKind.OPENING_CONTINUED: "the prompt begins the answer, and the completion continues from there",
    CompletionKind.REASONING_RESTORED: "the template leaves the reasoning out, and it is put back",
    CompletionKind.GIVEN_AS_TOKENS: "the dataset holds the tokens",
    "refused": "the turn cannot be rendered without losing something",
}
_SCHEDULES: dict[str, str] = {
    Schedule.NPASS: "each turn is a sequence",
    Schedule.CHAINS: "turns that begin another one are merged into it",
    Schedule.SINGLE_PASS: "each conversation is a tree",
    Schedule.SHARED: "conversations that begin alike share a row",
}


def _size_table(report: AuditFacts) -> Table:
    return _table_by_turn("Turns, with the mean number of tokens of each part", _SIZES, report)


def _template_table(report: AuditFacts) -> Table:
    return _table_by_turn("What the template does to turns", _TEMPLATE_EFFECTS, report)


def _table_by_turn(title: str, columns: Sequence[_Column], report: AuditFacts) -> Table:
    """A row for each of the first turns, one for the others and one for all; columns of zeros are left out."""
    columns = [column for column in columns if column.value(report.all_turns)]
    table = _table(title, "turn", *(column.heading for column in columns))
    table.caption = "; ".join(f"{column.heading.replace(chr(10), ' ')}: {column.meaning}" for column in columns)
    first, others = report.by_turn[:MAX_TURNS_SHOWN], report.by_turn[MAX_TURNS_SHOWN:]
    named = [(str(stats.turn), stats) for stats in first]
    if others:
        named.append((f"{others[0].turn}–{others[-1].turn}", TurnStats.merge(others)))
    for name, stats in named:
        table.add_row(name, *(_number(column.value(stats)) for column in columns))
    table.add_section()
    table.add_row("all", *(_number(column.value(report.all_turns)) for column in columns), style="bold")
    return table


def _number(value: int | float) -> str:
    return "–" if isnan(value) else f"{value:,.0f}"


def _kind_table(report: AuditFacts) -> Table:
    table = _table("Turns by kind of completion", "completion", "turns", "of all turns")
    for kind, count in report.all_turns.kinds.items():
        table.add_row(kind, f"{count:,}", _percent(count, report.all_turns.turns))
    table.caption = "; ".join(f"{kind}: {_KINDS[kind]}" for kind in report.all_turns.kinds)
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
    table.caption = (
        "of completions: share of all completion tokens; context unlike inference: share of the trained tokens whose "
        "context never occurs when the model is served; reasoning not trained: share of all reasoning tokens"
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
    if forecast.has_model:
        pairs = "attention pairs: a token and one that it sees, in all layers; PFLOP: 10^15 operations, both passes; "
    else:
        pairs = "pairs of a layer: a token and one that it sees; "
    table.caption = (
        f"{'; '.join(f'{schedule}: {meaning}' for schedule, meaning in _SCHEDULES.items())}; {pairs}"
        f"N-pass ÷ this: the speed-up that counted {'work' if forecast.has_model else 'tokens'} would give"
    )
    return table


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
