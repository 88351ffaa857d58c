"""`AuditReport`: what an audit finds, in numbers, in plain sentences, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from math import isnan, nan
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ...data.bad_rows import RowErrors
from ...trees.sample import CompletionKind
from ..wording import count_of
from .forecast import Forecast, Schedule, SharingByTurns
from .recipes import Recipe, RecipeReport
from .templates import ReasoningPolicy, TemplateFacts
from .turns import BranchCause, Lengths, TurnStats


MAX_TURNS_SHOWN = 12
WIDTH = 118


@dataclass(frozen=True, slots=True)
class AuditReport:
    """
    What a dataset contains, what its template makes of it, and what training on it costs; `str()` is a table.

    Args:
        num_rows (`int`, *optional*):
            Rows of the dataset; `None` for a stream.
        num_audited (`int`):
            Rows that were audited: all, a random sample, or the first ones of a stream.
        num_trainable (`int`):
            Audited rows that can be trained.
        errors (`tuple[RowErrors, ...]`):
            Why the others cannot, the most frequent reason first.
        templates (`tuple[tuple[TemplateFacts, int], ...]`):
            What the template does, and in how many conversations. Several entries if template arguments change what
            it does.
        all_turns (`TurnStats`):
            Counts over all turns.
        by_turn (`tuple[TurnStats, ...]`):
            Counts by the turn's position in its conversation.
        max_length (`int`, *optional*):
            Length in tokens that samples are compared with.
        sample_lengths (`Lengths`, *optional*):
            Tokens per sample; `None`, like `tree_lengths` and `forecast`, if no row can be trained.
        tree_lengths (`Lengths`, *optional*):
            Tokens per tree.
        num_chains (`int`):
            Samples with which no other sample begins: the leaves of the trees.
        sharing_by_turns (`tuple[SharingByTurns, ...]`):
            Token sharing by the number of turns of a conversation.
        recipes (`tuple[RecipeReport, ...]`):
            What other recipes would train of the same conversations.
        forecast (`Forecast`, *optional*):
            What training costs.
    """

    num_rows: int | None
    num_audited: int
    num_trainable: int
    errors: tuple[RowErrors, ...]
    templates: tuple[tuple[TemplateFacts, int], ...]
    all_turns: TurnStats
    by_turn: tuple[TurnStats, ...]
    max_length: int | None
    sample_lengths: Lengths | None
    tree_lengths: Lengths | None
    num_chains: int
    sharing_by_turns: tuple[SharingByTurns, ...]
    recipes: tuple[RecipeReport, ...]
    forecast: Forecast | None

    @property
    def findings(self) -> list[str]:
        """What deserves attention, in plain sentences."""
        return get_findings(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for `json.dumps`."""
        report = asdict(self)
        report["templates"] = [{**asdict(facts), "conversations": count} for facts, count in self.templates]
        report["findings"] = self.findings
        if self.forecast is not None:
            report["forecast"]["verdict"] = self.forecast.verdict
        return report

    def __str__(self) -> str:
        return format_report(self)


_POLICIES = {
    ReasoningPolicy.STRIPPED: "renders reasoning in the last turn and removes it from history",
    ReasoningPolicy.STRIPPED_EVERYWHERE: "leaves reasoning out of every turn, even the last one",
    ReasoningPolicy.MIXED: "keeps the reasoning of some earlier turns and removes that of others",
}
_CAUSES = {
    BranchCause.REASONING_REMOVED: "the reasoning is removed from history",
    BranchCause.EMPTY_BLOCK: (
        "the template writes an empty block in the place of missing reasoning, and leaves it out of history"
    ),
    BranchCause.OTHER_STOP: "the answer ends with a different token in history",
    BranchCause.EARLIER_HISTORY: "earlier history is rewritten too",
    BranchCause.OTHERWISE: "history shows the turn differently",
}
_REASONS = "The table of such rows gives the reasons."


def get_findings(report: AuditReport) -> list[str]:
    """Put what deserves attention into sentences, one or two per finding, without the forecast's verdict."""
    findings = [*_about_rows(report)]
    for facts, conversations in report.templates:
        where = "" if len(report.templates) == 1 else f" (in {count_of(conversations, 'conversation')})"
        findings += _about_template(facts, where)
    findings += [*_about_turns(report), *_about_prompts(report), *_about_branches(report)]
    for recipe in report.recipes:
        findings += _about_recipe(recipe)
    return findings


def _about_rows(report: AuditReport) -> Iterator[str]:
    lost = report.num_audited - report.num_trainable
    if lost:
        yield f"{lost:,} of {count_of(report.num_audited, 'row')} cannot be trained without changes. {_REASONS}"


def _about_template(facts: TemplateFacts, where: str) -> Iterator[str]:
    if facts.kind in _POLICIES:
        yield f"The {facts.name} {_POLICIES[facts.kind]}{where}."
    if facts.added_stop:
        yield f"The template writes no stop token after a last answer, so {facts.added_stop} is added{where}."
    elif facts.last_ending != facts.history_ending:
        last, history = facts.last_ending or "nothing", facts.history_ending or "nothing"
        yield f"A last answer ends with {last}, but the same answer in history with {history}{where}."


def _about_turns(report: AuditReport) -> Iterator[str]:
    turns = report.all_turns
    if turns.reasoning_under_other_key:
        yield (
            f"In {_of(turns.reasoning_under_other_key, turns.turns)}, reasoning stands under a key that the template "
            "ignores. Rename it to 'reasoning_content'."
        )
    if turns.reasoning_restored:
        yield (
            f"The template leaves out the reasoning of {_of(turns.reasoning_restored, turns.turns)}. It is put back "
            "between its tags."
        )
    if turns.reasoning_lost:
        yield f"In {_of(turns.reasoning_lost, turns.turns)}, the reasoning is lost."
    if turns.empty_blocks:
        yield (
            f"In {_of(turns.empty_blocks, turns.turns)}, there is no reasoning, and the template writes an empty "
            "block for it, which trains the model not to think."
        )
    if turns.calls_lost:
        yield f"In {_of(turns.calls_lost, turns.with_calls)} with tool calls, a call or part of one is lost."
    if turns.over_max_length:
        assert report.max_length is not None, "nothing is too long without a limit"
        limit = count_of(report.max_length, "token")
        yield f"The limit of {limit} is too short for {_of(turns.over_max_length, turns.trainable)}."


def _about_prompts(report: AuditReport) -> Iterator[str]:
    turns = report.all_turns
    if turns.not_token_prefix:
        yield (
            f"In {_of(turns.not_token_prefix, turns.turns)}, a token of the rendering spans the end of the prompt. "
            "The completion is tokenized on its own there, as the model would write it."
        )
    rewritten = turns.kinds.get(CompletionKind.HISTORY_REWRITTEN)
    if rewritten:
        yield (
            f"In {_of(rewritten, turns.turns)}, the template rewrites earlier messages once the answer is there. The "
            "prompt is trained as it is served, followed by the answer's own text."
        )
    continued = turns.kinds.get(CompletionKind.OPENING_CONTINUED)
    if continued:
        yield (
            f"In {_of(continued, turns.turns)}, the prompt begins the answer with words that the template does not "
            "write before such a message. The completion continues from there."
        )
    refused = turns.kinds.get("refused")
    if refused:
        yield f"{_of(refused, turns.turns)} cannot be rendered without losing something. {_REASONS}"


def _about_branches(report: AuditReport) -> Iterator[str]:
    turns = report.all_turns
    for cause, count in turns.branches.items():
        reason = _CAUSES[BranchCause(cause)]
        yield f"The tree forks after {_of(count, turns.followed)} with a successor, because {reason}."


def _about_recipe(recipe: RecipeReport) -> Iterator[str]:
    name = f"{recipe.name[0].upper()}{recipe.name[1:]}"
    if recipe.conversations == 0:
        if recipe.refusal:
            yield f"{name} cannot be used: {recipe.refusal}."
        return
    lost = recipe.reasoning_not_trained
    if lost:
        yield f"{name} would not train {_share(lost, recipe.reasoning_tokens)} of the reasoning tokens."
    if recipe.unlike_inference:
        share = _share(recipe.unlike_inference, recipe.trained_tokens)
        yield f"{name} would train {share} of its tokens in a context that never occurs at inference."
    untrained = recipe.completion_tokens - recipe.trained_tokens
    if recipe.name == Recipe.LAST_TURN and untrained:
        share = _share(untrained, recipe.completion_tokens)
        yield f"{name} would leave {share} of the completion tokens untrained."


def _of(count: int, total: int) -> str:
    return f"{count:,} of {count_of(total, 'turn')}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if part / whole >= 0.01 else "less than 1%"


def format_report(report: AuditReport) -> str:
    """Return an audit as text with lines of at most 118 characters."""
    text = StringIO()
    Console(file=text, width=WIDTH).print(render_report(report))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip() + "\n"


def render_report(report: AuditReport) -> RenderableType:
    """Return an audit for `rich` to print. Text from the dataset appears literally."""
    parts: list[RenderableType] = [Text(headline(report), style="bold")]
    if report.forecast is not None:
        parts.append(Text(report.forecast.verdict))
    lines = Text("\n".join(f"• {finding}" for finding in report.findings))
    parts += [Text("\nFindings", style="bold"), Padding(lines, (0, 0, 1, 2))]
    for table in tables(report):
        caption, table.caption = table.caption, None  # which rich would wrap to the width of the table
        parts += [table, Text(f"{caption}\n", style="dim")] if caption else [table]
    return Group(*parts)


def tables(report: AuditReport) -> list[Table]:
    """Return the tables of an audit that have something to show."""
    parts = [_error_table(report)] if report.errors else []
    if report.all_turns.turns or report.all_turns.trainable:
        parts.append(_size_table(report))
    if report.all_turns.turns:
        parts += [_template_table(report), _kind_table(report)]
    if report.forecast is not None:
        parts += [_recipe_table(report), _forecast_table(report, report.forecast)]
    return parts


def headline(report: AuditReport) -> str:
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


def _error_table(report: AuditReport) -> Table:
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


def _size_table(report: AuditReport) -> Table:
    return _table_by_turn("Turns, with the mean number of tokens of each part", _SIZES, report)


def _template_table(report: AuditReport) -> Table:
    return _table_by_turn("What the template does to turns", _TEMPLATE_EFFECTS, report)


def _table_by_turn(title: str, columns: Sequence[_Column], report: AuditReport) -> Table:
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


def _kind_table(report: AuditReport) -> Table:
    table = _table("Turns by kind of completion", "completion", "turns", "of all turns")
    for kind, count in report.all_turns.kinds.items():
        table.add_row(kind, f"{count:,}", _percent(count, report.all_turns.turns))
    table.caption = "; ".join(f"{kind}: {_KINDS[kind]}" for kind in report.all_turns.kinds)
    return table


def _recipe_table(report: AuditReport) -> Table:
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


def _forecast_table(report: AuditReport, forecast: Forecast) -> Table:
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
