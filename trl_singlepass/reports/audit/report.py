"""The report of an audit: its numbers, in plain sentences and in tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from math import isnan, nan
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ...data.bad_rows import RowErrors, count_of
from ...trees.errors import printable
from ...trees.sample import CompletionKind
from .forecast import Forecast, Schedule, SharingByTurns
from .recipes import Recipe, RecipeReport
from .turns import BranchCause, Lengths, ReasoningPolicy, TemplateFacts, TurnStats


_MAX_TURNS_SHOWN, _MAX_ERRORS_SHOWN = 12, 10
_WIDTH = 118  # characters of a line
# A smaller gain drowns in the noise of kernels, padding and data loading.
_WORTHWHILE = 1.1
_POLICIES = {
    ReasoningPolicy.STRIPPED: "renders reasoning in the last turn and removes it from history",
    ReasoningPolicy.STRIPPED_EVERYWHERE: "leaves reasoning out of every turn, even the last one",
    ReasoningPolicy.MIXED: "keeps the reasoning of some earlier turns and removes that of others",
}
_WHAT_TO_DO = {
    ReasoningPolicy.STRIPPED: "Nothing to do: each turn is trained with its own reasoning.",
    ReasoningPolicy.STRIPPED_EVERYWHERE: "Look at what is put back with `inspect`.",
    ReasoningPolicy.MIXED: "Nothing to do: each turn is trained as it is served.",
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
# What deserves attention in the turns with a count, out of all turns or out of those that `_OUT_OF` names.
_ABOUT_COUNTS = {
    "reasoning_under_other_key": (
        "In {}, reasoning stands under a key that the template ignores. Rename it to 'reasoning_content'."
    ),
    "reasoning_restored": (
        "The template leaves out the reasoning of {}. It is put back between its tags: look at one with `inspect`."
    ),
    "reasoning_lost": "In {}, the reasoning is lost. Use a template that renders it, or remove it.",
    "empty_blocks": (
        "In {}, there is no reasoning, and the template writes an empty block for it, which trains the model not to "
        "think. Set `train: false` on these turns if it should."
    ),
    "calls_lost": "In {} with tool calls, a call or part of one is lost. Use a template that renders tool calls.",
    "over_max_length": "The limit of {limit} is too short for {}. Raise --max_length, or set overlong_turns.",
    "not_token_prefix": (
        "In {}, a token of the rendering spans the end of the prompt. The completion is tokenized on its own there, "
        "as the model would write it. Nothing to do."
    ),
}
_OUT_OF = {"calls_lost": "with_calls", "over_max_length": "trainable"}
# What deserves attention in the turns of a kind of completion.
_ABOUT_KINDS = {
    CompletionKind.HISTORY_REWRITTEN: (
        "In {}, the template rewrites earlier messages once the answer is there. The prompt is trained as it is "
        "served, followed by the answer's own text. Nothing to do."
    ),
    CompletionKind.OPENING_CONTINUED: (
        "In {}, the prompt begins the answer with words that the template does not write before such a message. The "
        "completion continues from there. Nothing to do."
    ),
    "refused": f"{{}} cannot be rendered without losing something. {_REASONS}",
}
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
    def headline(self) -> str:
        """What was audited, in one line."""
        if self.num_rows is None:
            audited = f"the first {count_of(self.num_audited, 'row')} of a stream"
        elif self.num_audited < self.num_rows:
            audited = f"{count_of(self.num_audited, 'row')} drawn at random from {self.num_rows:,}"
        else:
            audited = count_of(self.num_rows, "row")
        facts = [one for one, _ in self.templates]
        policies = ", ".join(dict.fromkeys(one.kind for one in facts)) or "not rendered"
        names = ", ".join(dict.fromkeys(one.name for one in facts)) or "chat template"
        return f"{audited}, {count_of(_num_turns(self.all_turns), 'turn')}; {names}: reasoning {policies}"

    @property
    def verdict(self) -> str:
        """What the forecast means, in a sentence or two; empty without one."""
        if self.forecast is None:
            return ""
        gain, what = self.forecast.over_npass.value, "work" if self.forecast.has_model else "tokens"
        over_chains, in_all = self.forecast.over_chains.value, self.forecast.shared_over_npass.value
        sharing = ""
        if in_all / gain >= _WORTHWHILE:
            sharing = f" Packing conversations that begin alike saves more: {in_all:.2f} × in all."
        if gain < _WORTHWHILE:
            return (
                f"A single pass saves too little to matter here: N separate samples take {gain:.2f} × its {what}. "
                f"It is still exact.{sharing}"
            )
        if over_chains < _WORTHWHILE:
            return (
                f"A single pass saves {1 - 1 / gain:.0%} of the {what} of N separate samples, but too little to "
                f"matter compared with {Schedule.CHAINS} ({over_chains:.2f} ×).{sharing}"
            )
        return (
            f"A single pass saves {1 - 1 / gain:.0%} of the {what} of N separate samples: expect up to {gain:.2f} × "
            f"the speed, and up to {over_chains:.2f} × that of {Schedule.CHAINS}.{sharing}"
        )

    @property
    def findings(self) -> list[str]:
        """What deserves attention, in plain sentences."""
        lost = f"{self.num_audited - self.num_trainable:,} of {count_of(self.num_audited, 'row')}"
        return [
            *([f"{lost} cannot be trained without changes. {_REASONS}"] if self.errors else []),
            *_about_templates(self.templates),
            *_about_turns(self.all_turns, self.max_length),
            *(finding for recipe in self.recipes for finding in _about_recipe(recipe)),
        ]

    @property
    def tables(self) -> list[Table]:
        """The tables that have something to show."""
        turns, shown = self.all_turns, []
        if self.errors:
            shown.append(_error_table(self.errors))
        if turns.turns or turns.trainable:
            title = "Turns, with the mean number of tokens of each part"
            shown.append(_table_by_turn(title, _SIZES, self.by_turn, turns))
        if turns.turns:
            title = "What the template does to turns"
            shown += [_table_by_turn(title, _TEMPLATE_EFFECTS, self.by_turn, turns), _kind_table(turns)]
        if self.forecast is not None:
            scale = self.num_rows / self.num_audited if self.num_rows else 1.0
            shown += [_recipe_table(self.recipes), _forecast_table(self.forecast, scale)]
        return shown

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for `json.dumps`."""
        report = asdict(self)
        report["templates"] = [{**asdict(facts), "conversations": count} for facts, count in self.templates]
        report["findings"] = self.findings
        if self.forecast is not None:
            report["forecast"]["verdict"] = self.verdict
        return report

    def __str__(self) -> str:
        printed = StringIO()
        Console(file=printed, width=_WIDTH).print(self)
        return "\n".join(line.rstrip() for line in printed.getvalue().splitlines()).strip() + "\n"

    def __rich__(self) -> RenderableType:  # text from the dataset appears literally
        parts: list[RenderableType] = [Text(self.headline, style="bold")]
        if self.verdict:
            parts.append(Text(self.verdict))
        lines = Text("\n".join(f"• {printable(finding)}" for finding in self.findings))
        parts += [Text("\nFindings", style="bold"), Padding(lines, (0, 0, 1, 2))]
        for table in self.tables:
            caption, table.caption = table.caption, None  # which rich would wrap to the width of the table
            parts += [table, Text(f"{caption}\n", style="dim")] if caption else [table]
        return Group(*parts)


def _about_templates(templates: Sequence[tuple[TemplateFacts, int]]) -> Iterator[str]:
    """Say what the template does, in how many conversations if it depends on its arguments."""
    for facts, conversations in templates:
        where = "" if len(templates) == 1 else f" (in {count_of(conversations, 'conversation')})"
        if facts.kind in _POLICIES:
            yield f"The {facts.name} {_POLICIES[facts.kind]}{where}. {_WHAT_TO_DO[facts.kind]}"
        if facts.added_stop:
            yield (
                f"The template writes no stop token after a last answer, so {facts.added_stop} is added{where}. "
                "Nothing to do if the model stops there."
            )
        elif facts.last_ending != facts.history_ending:
            last, history = facts.last_ending or "nothing", facts.history_ending or "nothing"
            ends = f"A last answer ends with {last}, but the same answer in history with {history}{where}"
            yield f"{ends}. Nothing to do: both are trained as they are served."


def _about_turns(turns: TurnStats, max_length: int | None) -> Iterator[str]:
    """Say what the template loses or changes, and why the tree forks."""
    limit = "" if max_length is None else count_of(max_length, "token")
    for name, sentence in _ABOUT_COUNTS.items():
        if count := getattr(turns, name):
            yield sentence.format(_of(count, getattr(turns, _OUT_OF.get(name, "turns"))), limit=limit)
    for kind, sentence in _ABOUT_KINDS.items():
        if kind in turns.kinds:
            yield sentence.format(_of(turns.kinds[kind], turns.turns))
    for cause, count in turns.branches.items():
        reason = _CAUSES[BranchCause(cause)]
        forks = f"The tree forks after {_of(count, turns.followed)} with a successor, because {reason}"
        yield f"{forks}. Nothing to do: each turn is trained as it is served."


def _about_recipe(recipe: RecipeReport) -> Iterator[str]:
    """Say what another recipe would miss."""
    name = f"{recipe.name[0].upper()}{recipe.name[1:]}"
    if recipe.conversations == 0:
        if recipe.refusal:
            yield f"{name} cannot be used: {recipe.refusal}."
        return
    lost = recipe.reasoning_not_trained
    if lost:
        share = _share(lost, recipe.reasoning_tokens)
        yield f"{name} would not train {share} of the reasoning tokens. Train with a single pass."
    if recipe.unlike_inference:
        share = _share(recipe.unlike_inference, recipe.trained_tokens)
        where = "where the model never writes them"
        yield f"{name} would train {share} of its tokens {where}. Train with a single pass."
    untrained = recipe.completion_tokens - recipe.trained_tokens
    if recipe.name == Recipe.LAST_TURN and untrained:
        share = _share(untrained, recipe.completion_tokens)
        yield f"{name} would leave {share} of the completion tokens untrained. Train every turn."


def _of(count: int, total: int) -> str:
    return f"{count:,} of {count_of(total, 'turn')}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if part / whole >= 0.01 else "less than 1%"


def _error_table(errors: Sequence[RowErrors]) -> Table:
    """List rows that cannot be trained, by reason."""
    table = Table(title="Rows that cannot be trained", title_justify="left", title_style="bold")
    for name in ("rows", "first rows", "reason"):
        table.add_column(name, overflow="fold")
    for error in errors[:_MAX_ERRORS_SHOWN]:
        reason = error.reason if len(error.reason) <= 400 else f"{error.reason[:399]}…"
        table.add_row(str(error.count), ", ".join(map(str, error.rows)), Text(printable(reason)))
    return table


class _Column(NamedTuple):
    """A column of a table by turn: what it says of a turn, and what its heading means."""

    heading: str
    value: Callable[[TurnStats], int | float]
    meaning: str


def _num_turns(stats: TurnStats) -> int:
    return max(stats.turns, stats.trainable)  # no template renders those that the dataset holds as tokens


def _mean(count: Callable[[TurnStats], int]) -> Callable[[TurnStats], float]:
    return lambda stats: count(stats) / stats.trainable if stats.trainable else nan


_SIZES = (
    _Column("turns", _num_turns, "conversations that have this turn"),
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


def _table_by_turn(title: str, columns: Sequence[_Column], by_turn: Sequence[TurnStats], total: TurnStats) -> Table:
    """A row for each of the first turns, one for the others and one for all; columns of zeros are left out."""
    columns = [column for column in columns if column.value(total)]
    table = _table(title, "turn", *(column.heading for column in columns))
    table.caption = "; ".join(f"{column.heading.replace(chr(10), ' ')}: {column.meaning}" for column in columns)
    named = [(str(stats.turn), stats) for stats in by_turn[:_MAX_TURNS_SHOWN]]
    if others := by_turn[_MAX_TURNS_SHOWN:]:
        named.append((f"{others[0].turn}–{others[-1].turn}", TurnStats.merge(others)))
    for name, stats in named:
        table.add_row(name, *(_number(column.value(stats)) for column in columns))
    table.add_section()
    table.add_row("all", *(_number(column.value(total)) for column in columns), style="bold")
    return table


def _kind_table(turns: TurnStats) -> Table:
    """Show how completions came about."""
    table = _table("Turns by kind of completion", "completion", "turns", "of all turns")
    for kind, count in turns.kinds.items():
        table.add_row(kind, f"{count:,}", _percent(count, turns.turns))
    table.caption = "; ".join(f"{kind}: {_KINDS[kind]}" for kind in turns.kinds)
    return table


def _recipe_table(recipes: Iterable[RecipeReport]) -> Table:
    """Show what other recipes would train."""
    table = _table(
        "What other recipes would train of the same conversations",
        "recipe",
        "conversations",
        "tokens\ntrained",
        "of completions",
        "context unlike\ninference",
        "reasoning\nnot trained",
    )
    for recipe in recipes:
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
        "of completions: share of all completion tokens; context unlike inference: share of the trained tokens that "
        "the model does not write when it is served, or not in this context; reasoning not trained: share of all "
        "reasoning tokens"
    )
    return table


def _forecast_table(forecast: Forecast, scale: float) -> Table:
    """Show what training costs, as `scale` times the cost of the audited rows."""
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


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", vertical="bottom")
    return table


def _number(value: int | float) -> str:
    return "–" if isnan(value) else f"{value:,.0f}"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "–"
