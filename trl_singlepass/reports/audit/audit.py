"""`audit`: look at a random sample of a dataset's rows and sum up what they contain."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from datasets.utils.tqdm import tqdm
from transformers import ProcessorMixin

from ...cost.flops import ModelShape, get_model_shape
from ...data.bad_rows import BadRowError, UnexpectedError, get_reason, group_errors, unexpected_error
from ...data.conversations import example_to_samples
from ...data.images import holds_images
from ...data.settings import RowSettings
from ...data.tokenized_turns import get_tokenized_turns
from ...data.vision import ConversationReader, as_reader, check_renders, get_tokenizer
from ...preference.pairs import TOKEN_COLUMNS, example_to_pair, is_pair, split_pair
from ...preference.settings import PairSettings
from ...rendering.conversation import Conversation
from ...rendering.prefixes import Prefixes
from ...trees.errors import DataError
from .forecast import ConversationCost, Schedule, count_conversation, make_forecast, sharing_by_turns
from .recipes import AssistantOnlyLoss, Recipe, RecipeCounts, RecipeReport, count_last_turn
from .report import AuditReport
from .templates import TemplateFacts, TemplateSurvey
from .turns import Lengths, TurnExaminer, TurnStats


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from ...rendering.conversation import Message
    from ...trees.sample import Sample

    Rows: TypeAlias = Dataset | Sequence[Mapping[str, object] | list[Message]]

DEFAULT_SAMPLE_SIZE = 500
_BATCH_SIZE = 32  # rows that a process audits before it reports back
_NO_RECIPE = "it is not counted for conversations with images"
_NO_PAIRS = "it is a setting of fine-tuning, and these are preference pairs"


def audit(
    dataset: Rows | IterableDataset,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    model_config: PreTrainedConfig | None = None,
    *,
    sample_size: int | None = None,
    seed: int = 0,
    max_length: int | None = None,
    chat_template: str | None = None,
    num_proc: int | None = None,
) -> AuditReport:
    """
    Report what a dataset contains, what its chat template drops, and what training on it would cost.

    Nothing is trained and no model is loaded. Rows that cannot be rendered are counted, with the reason.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or `list`):
            Conversations, as [`SinglePassSFTTrainer`] takes them; a list may also hold plain lists of messages. Of
            preference pairs, each trajectory is reported, and what the turns of both share in one tree.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Tokenizer with a chat template; the processor for conversations with images.
        model_config (`transformers.PreTrainedConfig`, *optional*):
            Configuration of the model to train, to count floating-point operations. Without it, the forecast counts
            tokens, and attention pairs of one layer.
        sample_size (`int`, *optional*):
            Number of rows to draw at random; ratios then come with a 95 % confidence interval. Defaults to 500, or to
            all rows if there are fewer. A stream is not sampled: its first rows are taken.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        max_length (`int`, *optional*):
            Length in tokens to compare samples with. Defaults to the model's `max_position_embeddings`.
        chat_template (`str`, *optional*):
            Template to use instead of the tokenizer's own.
        num_proc (`int`, *optional*):
            Number of processes. The report does not depend on it.

    Returns:
        [`AuditReport`]: `str()` of it is a table, `.findings` are sentences, `.to_dict()` is for JSON.

    Raises:
        `ValueError`: If the dataset is empty, the tokenizer has no chat template, or the operations of the model
            cannot be counted.

    Example:

    ```python
    print(audit(dataset, tokenizer, model.config))
    ```
    """
    if max_length is None and model_config is not None:
        max_length = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    num_rows = len(dataset) if hasattr(dataset, "__len__") else None
    tokenizer = _with_template(tokenizer, chat_template)
    if isinstance(tokenizer, ProcessorMixin) and not holds_images(dataset):
        tokenizer = tokenizer.tokenizer
    auditor = Auditor(tokenizer, get_model_shape(model_config), max_length)
    rows, positions = _draw(dataset, num_rows, DEFAULT_SAMPLE_SIZE if sample_size is None else sample_size, seed)
    if not positions:
        raise ValueError("Nothing to audit: the dataset is empty.")
    tally = _audit_positions(auditor, rows, positions, num_proc or 1)
    return _make_report(tally, auditor, num_rows)


def _with_template(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin, chat_template: str | None
) -> PreTrainedTokenizerBase | ProcessorMixin:
    if isinstance(tokenizer, ProcessorMixin):
        processor = copy.copy(tokenizer)
        processor.tokenizer = _with_template(tokenizer.tokenizer, chat_template or tokenizer.chat_template)
        processor.chat_template = processor.tokenizer.chat_template
        return processor
    check_renders(tokenizer)
    if chat_template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chat_template
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template to render conversations with. Pass chat_template.")
    return tokenizer


def _draw(
    dataset: Rows | IterableDataset, num_rows: int | None, sample_size: int, seed: int
) -> tuple[Rows, list[int]]:
    """Return rows, and the positions of those to audit."""
    if sample_size < 1:
        raise ValueError(f"sample_size must be 1 or more, got {sample_size}.")
    if num_rows is None:
        rows = list(islice(dataset, sample_size))
        return rows, list(range(len(rows)))
    drawn = np.random.default_rng(seed).permutation(num_rows)[:sample_size]
    return dataset, np.sort(drawn).tolist()


@dataclass(slots=True)
class Tally:
    """What the audited rows contain. Of their tokens, only first prompts are kept."""

    num_rows: int = 0
    errors: list[tuple[int, str]] = field(default_factory=list)  # rows that cannot be trained, each with its reason
    templates: Counter[TemplateFacts] = field(default_factory=Counter)  # by number of conversations
    all_turns: TurnStats = field(default_factory=TurnStats)
    by_turn: list[TurnStats] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # tokens of each sample
    costs: list[ConversationCost] = field(default_factory=list)
    last_turn: list[RecipeCounts] = field(default_factory=list)
    assistant_only: list[RecipeCounts] = field(default_factory=list)
    recipe_refusals: Counter[str] = field(default_factory=Counter)

    def merge(self, later: Tally) -> None:
        """Add the tally of the rows after these."""
        self.num_rows += later.num_rows
        self.all_turns += later.all_turns
        both = zip_longest(self.by_turn, later.by_turn, fillvalue=TurnStats())
        self.by_turn = [TurnStats.merge(pair, turn=k) for k, pair in enumerate(both, 1)]
        for name in ("templates", "recipe_refusals"):
            getattr(self, name).update(getattr(later, name))
        for name in ("errors", "lengths", "costs", "last_turn", "assistant_only"):
            getattr(self, name).extend(getattr(later, name))

    def add_turns(self, turns: Iterable[TurnStats]) -> None:
        """Add counts of turns, in the order of their conversation."""
        for place, stats in enumerate(turns):
            if place == len(self.by_turn):
                self.by_turn.append(TurnStats(turn=place + 1))
            self.by_turn[place] += stats
            self.all_turns += stats

    def add_samples(self, samples: Sequence[Sample], max_length: int | None) -> None:
        """Add the samples of a conversation that can be trained."""
        self.add_turns(TurnStats.from_sample(sample, max_length) for sample in samples)
        self.lengths += map(len, samples)
        self.last_turn.append(count_last_turn(samples))


class Auditor:
    """Audits rows for a tokenizer or processor, with the sizes of a model and the length to compare samples with."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, shape: ModelShape, max_length: int | None
    ) -> None:
        self.max_length = max_length
        self.reader, self.tokenizer, self.shape = as_reader(tokenizer), get_tokenizer(tokenizer), shape
        self.recipe, self.survey = AssistantOnlyLoss(self.tokenizer), TemplateSurvey(self.tokenizer)

    def add_row(self, index: int, row: Mapping[str, object], tally: Tally) -> None:
        """Add one row to a tally. Anything wrong with it is recorded, so that the other rows can still be audited."""
        tally.num_rows += 1
        row = dict(row)
        try:
            (self._add_pair if is_pair(row) else self._add_conversation)(index, row, tally)
        except DataError as error:
            tally.errors.append((index, get_reason(error, index)))
        except (AssertionError, UnexpectedError):
            raise
        except Exception as error:
            raise unexpected_error(error, index) from error

    def _add_conversation(self, index: int, row: Mapping[str, object], tally: Tally) -> None:
        conversation: Conversation | None = None
        if get_tokenized_turns(row) is None:  # otherwise it has tokens already, and no template is involved
            conversation = self._read(index, row)
        samples = self._to_samples(index, row, conversation, tally)
        if not samples:
            raise BadRowError("All its turns have the weight 0, so nothing of it is trained.")
        tally.add_samples(samples, self.max_length)
        tally.costs.append(count_conversation(samples, self.shape))
        self._count_assistant_only(conversation, samples, tally)

    def _to_samples(
        self, index: int, row: Mapping[str, object], conversation: Conversation | None, tally: Tally
    ) -> Sequence[Sample]:
        """Return the samples of a row, and add the facts about its turns, whether or not they can be trained."""
        if conversation is None:
            return example_to_samples(row, index, self.reader, RowSettings()).samples
        examiner = self._examine(conversation, tally)
        try:
            return example_to_samples(row, index, self.reader, RowSettings(), prefixes=examiner.prefixes).samples
        finally:
            tally.add_turns(examiner.finish())

    def _examine(self, conversation: Conversation, tally: Tally) -> TurnExaminer:
        prefixes = Prefixes.from_conversation(conversation, self.tokenizer)
        tally.templates[self.survey.get_facts(conversation)] += 1
        return TurnExaminer(conversation, prefixes)

    def _read(self, index: int, row: Mapping[str, Any]) -> Conversation:
        if isinstance(self.reader, ConversationReader):
            return self.reader.read_conversation(row, index)
        return Conversation.from_example(dict(row))

    def _count_assistant_only(
        self, conversation: Conversation | None, samples: Sequence[Sample], tally: Tally
    ) -> None:
        if conversation is not None and conversation.images is not None:
            tally.recipe_refusals[_NO_RECIPE] += 1
        elif self.recipe.refusal is None and conversation is not None:
            try:
                tally.assistant_only.append(self.recipe.count(conversation, samples))
            except Exception as error:  # TRL's training templates refuse some rows that the stock ones render
                tally.recipe_refusals[str(error) or type(error).__name__] += 1

    def _add_pair(self, index: int, row: Mapping[str, object], tally: Tally) -> None:
        """Add both trajectories of a pair, and the cost of their one tree."""
        pair = example_to_pair(row, index, self.reader, PairSettings())
        for example in () if set(TOKEN_COLUMNS) <= set(row) else split_pair(row, index).values():
            tally.add_turns(self._examine(self._read(index, example), tally).finish())
        for side in pair.sides:
            tally.add_samples(side.samples, self.max_length)
        tally.costs.append(count_conversation(pair.samples, self.shape))
        tally.recipe_refusals[_NO_PAIRS] += 1


def _audit_positions(auditor: Auditor, rows: Rows, positions: list[int], num_proc: int) -> Tally:
    tally = Tally()
    with tqdm(total=len(positions), desc="Auditing conversations", unit=" rows") as bar:
        for part in _audit_batches(auditor, rows, positions, num_proc):
            tally.merge(part)
            bar.update(part.num_rows)
    return tally


def _audit_batches(auditor: Auditor, rows: Rows, positions: list[int], num_proc: int) -> Iterator[Tally]:
    """Yield tallies in the order of the rows, so that the report does not depend on the number of processes."""
    if num_proc == 1:
        for position in positions:
            yield _audit_rows(auditor, rows, [position])
        return
    batches = [positions[start : start + _BATCH_SIZE] for start in range(0, len(positions), _BATCH_SIZE)]
    with (
        _without_tokenizer_threads(),
        ProcessPoolExecutor(num_proc, initializer=_start_worker, initargs=(auditor, rows)) as pool,
    ):
        yield from pool.map(_audit_in_worker, batches)


def _audit_rows(auditor: Auditor, rows: Rows, positions: Sequence[int]) -> Tally:
    tally = Tally()
    for position in positions:
        row = rows[position]
        auditor.add_row(position, {"messages": row} if isinstance(row, list) else row, tally)
    return tally


# A worker gets auditor and rows once: as arguments, they would be pickled again for every batch.
_worker: list[tuple[Auditor, Rows]] = []


def _start_worker(auditor: Auditor, rows: Rows) -> None:
    _worker[:] = [(auditor, rows)]


def _audit_in_worker(positions: list[int]) -> Tally:
    return _audit_rows(*_worker[0], positions)


@contextmanager
def _without_tokenizer_threads() -> Iterator[None]:
    """Tokenizers that have used threads warn in every process forked from theirs, unless told not to use any."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _make_report(tally: Tally, auditor: Auditor, num_rows: int | None) -> AuditReport:
    costs = tally.costs
    coverage = 0.0 if num_rows is None else tally.num_rows / num_rows
    refusal = auditor.recipe.refusal or next(iter(tally.recipe_refusals), None)
    return AuditReport(
        num_rows=num_rows,
        num_audited=tally.num_rows,
        num_trainable=len(costs),
        errors=group_errors(tally.errors),
        templates=tuple(tally.templates.most_common()),
        all_turns=tally.all_turns,
        by_turn=tuple(tally.by_turn),
        max_length=auditor.max_length,
        sample_lengths=Lengths.from_values(tally.lengths) if costs else None,
        tree_lengths=Lengths.from_values(c.by_schedule[Schedule.SINGLE_PASS].tokens for c in costs) if costs else None,
        num_chains=sum(cost.num_chains for cost in costs),
        sharing_by_turns=sharing_by_turns(costs),
        recipes=(
            RecipeReport.from_counts(Recipe.ASSISTANT_ONLY, tally.assistant_only, refusal),
            RecipeReport.from_counts(Recipe.LAST_TURN, tally.last_turn, None),
        ),
        forecast=make_forecast(costs, auditor.shape, coverage) if costs else None,
    )
