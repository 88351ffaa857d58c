"""`audit`: look at a sample of a dataset's rows, one by one, and sum up."""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from datasets.utils.tqdm import tqdm

from ..conversation_rows import samples_of
from ..cost import ModelShape
from ..rendering_messages import Conversation
from ..settings import RowSettings
from .counts import Lengths, SampleSize, SharingByTurns, TurnStats
from .forecast import NPASS, SINGLE_PASS, ConversationCost, conversation_cost, forecast, shape_of
from .recipes import ASSISTANT_ONLY, LAST_TURN, AssistantOnlyLoss, RecipeCounts, last_turn_only
from .report import AuditReport, RecipeReport, RowErrors
from .templates import TemplateFacts, TemplateSurvey
from .turns import TurnFacts, turn_facts


DEFAULT_SAMPLE_SIZE = 500
_ROWS_NAMED = 5


def audit(
    dataset: Iterable[Any],
    tokenizer: Any,
    model_config: Any = None,
    *,
    sample_size: int | None = None,
    seed: int = 0,
    max_length: int | None = None,
    chat_template: str | None = None,
) -> AuditReport:
    """
    Look at what a dataset holds, what its chat template drops, and what training it would cost.

    Nothing is trained and no model is loaded. Rows that cannot be rendered are counted with their reason.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset`, `list`):
            Conversations, as [`SinglePassSFTTrainer`] takes them; in a list, also plain lists of messages.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        model_config (`transformers.PreTrainedConfig`, *optional*):
            Configuration of the model that will be trained, to count floating-point operations with. Without one,
            the forecast counts tokens, and attention pairs of one layer.
        sample_size (`int`, *optional*):
            Number of rows to look at, drawn at random; ratios then come with a 95 % confidence interval. 500 by
            default, or all rows if there are fewer. Of a stream, the first rows are taken.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        max_length (`int`, *optional*):
            Length in tokens to compare samples with; the model's `max_position_embeddings` by default.
        chat_template (`str`, *optional*):
            Template to use instead of the tokenizer's own.

    Returns:
        [`AuditReport`]: The report. `str()` of it is a table, `.findings` are sentences, `.to_dict()` is for JSON.

    Raises:
        `ValueError`: If the dataset is empty, the tokenizer has no chat template, or the operations of the model
            cannot be counted.

    Example:

    ```python
    from trl_singlepass import audit

    print(audit(dataset, tokenizer, model.config))
    ```
    """
    if chat_template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chat_template
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template, so conversations have no text. Pass chat_template.")
    if max_length is None:
        max_length = getattr(model_config and model_config.get_text_config(), "max_position_embeddings", None)
    shape, num_rows = shape_of(model_config), _length(dataset)
    tally = _Tally(tokenizer, shape)
    rows = _sample(dataset, num_rows, DEFAULT_SAMPLE_SIZE if sample_size is None else sample_size, seed)
    for index, row in tqdm(rows, desc="Auditing conversations", unit=" rows"):
        tally.add(index, {"messages": row} if isinstance(row, list) else dict(row))
    if tally.num_rows == 0:
        raise ValueError("Nothing to audit: the dataset is empty.")
    return _report(tally, num_rows, max_length)


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _sample(dataset: Any, num_rows: int | None, sample_size: int, seed: int) -> Sequence[tuple[int, Any]] | _Indexed:
    if sample_size < 1:
        raise ValueError(f"sample_size must be 1 or more, got {sample_size}.")
    if num_rows is None:
        return list(enumerate(islice(dataset, sample_size)))
    drawn = np.random.default_rng(seed).permutation(num_rows)[:sample_size]
    return _Indexed(dataset, np.sort(drawn).tolist())


@dataclass(frozen=True, slots=True)
class _Indexed:
    """Rows at some positions, read when they are looked at."""

    dataset: Any
    positions: list[int]

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return ((position, self.dataset[position]) for position in self.positions)


@dataclass(slots=True)
class _Tally:
    """What the rows looked at so far hold. Of the tokens themselves, only first prompts are kept."""

    tokenizer: Any
    shape: ModelShape
    num_rows: int = 0
    errors: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))
    templates: Counter[TemplateFacts] = field(default_factory=Counter)
    turns: list[list[TurnFacts]] = field(default_factory=list)
    sizes: list[list[SampleSize]] = field(default_factory=list)
    costs: list[ConversationCost] = field(default_factory=list)
    last_turn: list[RecipeCounts] = field(default_factory=list)
    assistant_only: list[RecipeCounts] = field(default_factory=list)
    recipe: AssistantOnlyLoss = field(init=False)
    recipe_refusals: Counter[str] = field(default_factory=Counter)
    survey: TemplateSurvey = field(init=False)

    def __post_init__(self) -> None:
        self.recipe, self.survey = AssistantOnlyLoss(self.tokenizer), TemplateSurvey(self.tokenizer)

    def add(self, index: int, row: dict[str, Any]) -> None:
        """Look at one row. Whatever is wrong with it is noted; it must not keep the others from being looked at."""
        self.num_rows += 1
        conversation: Conversation | None = None
        try:
            if row.get("turns") is None:  # tokens already: no template takes part
                conversation = Conversation.from_row(row)
                self.turns.append(turn_facts(conversation, self.tokenizer))
                self.templates[self.survey.facts(conversation)] += 1
            samples = samples_of(row, index, self.tokenizer, RowSettings()).samples
            if not samples:
                raise ValueError("All its turns have the weight 0, so nothing of it is trained.")
        except Exception as error:  # a row can be anything, and templates raise what they like
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            reason = reason.removeprefix(f"Row {index}: ")
            self.errors[_kind_of(reason)].append((index, reason))
            return
        self.sizes.append([SampleSize.of(sample) for sample in samples])
        self.costs.append(conversation_cost(samples, self.shape))
        self.last_turn.append(last_turn_only(samples))
        if self.recipe.refusal is None and conversation is not None:
            try:
                self.assistant_only.append(self.recipe.counts(conversation, samples))
            except Exception as error:  # noted: TRL's training templates refuse what the stock ones render
                self.recipe_refusals[str(error) or type(error).__name__] += 1


def _kind_of(reason: str) -> str:
    """Reason without what differs from row to row: names, numbers and quoted values."""
    reason = re.sub(r"^Message \d+ cannot be rendered with the [^:]*: ", "", reason)
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "…", reason)


def _report(tally: _Tally, num_rows: int | None, max_length: int | None) -> AuditReport:
    facts, sizes, costs = tally.turns, tally.sizes, tally.costs
    depth = max([*map(len, facts), *map(len, sizes)], default=0)
    coverage = 0.0 if num_rows is None else tally.num_rows / num_rows
    return AuditReport(
        num_rows=num_rows,
        num_audited=tally.num_rows,
        num_trainable=len(costs),
        errors=_errors(tally),
        templates=tuple(tally.templates.most_common()),
        all_turns=TurnStats.of(None, [f for row in facts for f in row], [s for row in sizes for s in row], max_length),
        by_turn=tuple(TurnStats.of(k + 1, _at(facts, k), _at(sizes, k), max_length) for k in range(depth)),
        max_length=max_length,
        sample_lengths=Lengths.of(size.length for row in sizes for size in row) if sizes else None,
        tree_lengths=Lengths.of(cost.by_schedule[SINGLE_PASS].tokens for cost in costs) if costs else None,
        num_chains=sum(cost.num_chains for cost in costs),
        sharing_by_turns=_sharing_by_turns(costs),
        recipes=_recipes(tally),
        forecast=forecast(costs, tally.shape, coverage) if costs else None,
    )


def _at(rows: Sequence[Sequence[Any]], place: int) -> list[Any]:
    return [row[place] for row in rows if place < len(row)]


def _errors(tally: _Tally) -> tuple[RowErrors, ...]:
    groups = sorted(tally.errors.values(), key=len, reverse=True)
    return tuple(
        RowErrors(len(group), tuple(index for index, _ in group[:_ROWS_NAMED]), group[0][1]) for group in groups
    )


def _sharing_by_turns(costs: Sequence[ConversationCost]) -> tuple[SharingByTurns, ...]:
    groups: dict[int, list[ConversationCost]] = defaultdict(list)
    for cost in costs:
        groups[cost.num_turns].append(cost)
    return tuple(
        SharingByTurns(
            num_turns,
            len(group),
            sum(cost.by_schedule[NPASS].tokens for cost in group),
            sum(cost.by_schedule[SINGLE_PASS].tokens for cost in group),
        )
        for num_turns, group in sorted(groups.items())
    )


def _recipes(tally: _Tally) -> tuple[RecipeReport, ...]:
    refusal = tally.recipe.refusal or next(iter(tally.recipe_refusals), None)
    return (
        _recipe(ASSISTANT_ONLY, tally.assistant_only, refusal),
        _recipe(LAST_TURN, tally.last_turn, None),
    )


def _recipe(name: str, counts: Sequence[RecipeCounts], refusal: str | None) -> RecipeReport:
    fields = RecipeCounts.__dataclass_fields__
    return RecipeReport(name, len(counts), refusal, **{f: sum(getattr(count, f) for count in counts) for f in fields})
