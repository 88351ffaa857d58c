"""`audit`: look at a random sample of a dataset's examples (rows, to the user) and sum up what they contain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from accelerate.utils import patch_environment
from datasets.utils.tqdm import tqdm
from transformers import ProcessorMixin

from ...cost.flops import ModelShape, get_model_shape
from ...data.bad_rows import BadRowError, UnexpectedError, get_reason, group_errors, unexpected_error
from ...data.conversations import example_to_samples, read_conversation
from ...data.images import holds_images
from ...data.pairs import TOKEN_COLUMNS, example_to_pair, is_pair, split_pair
from ...data.reader import as_reader, get_tokenizer, with_chat_template
from ...data.requests import split_requests
from ...data.settings import PairSettings, RowSettings
from ...data.tokenized_turns import get_tokenized_turns
from ...rendering.conversation import Conversation
from ...rendering.prefixes import Prefixes
from ...rendering.template import TemplateKey
from ...trees.errors import DataError
from .forecast import ConversationCost, Schedule, count_conversation, make_forecast, sharing_by_turns
from .recipes import OneSequence, Recipe, RecipeReport, count_last_turn
from .report import AuditReport
from .turns import Lengths, TemplateFacts, TurnExaminer, TurnStats, survey_template


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from ...rendering.conversation import Message
    from ...trees.sample import Sample

    Examples: TypeAlias = Dataset | Sequence[Mapping[str, object] | list[Message]]

DEFAULT_SAMPLE_SIZE = 500
_BATCH_SIZE = 32  # examples that a process audits before it reports back


def audit(
    dataset: Examples | IterableDataset,
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
    tokenizer = with_chat_template(tokenizer, chat_template)
    if get_tokenizer(tokenizer).chat_template is None:
        raise ValueError("The tokenizer has no chat template to render conversations with. Pass chat_template.")
    if isinstance(tokenizer, ProcessorMixin) and not holds_images(dataset):
        tokenizer = tokenizer.tokenizer
    shape = get_model_shape(model_config)
    examples, positions = _draw(dataset, num_rows, DEFAULT_SAMPLE_SIZE if sample_size is None else sample_size, seed)
    if not positions:
        raise ValueError("Nothing to audit: the dataset is empty.")
    auditor = Auditor(examples, tokenizer, shape, max_length)
    audited = _audit_examples(auditor, positions, num_proc or 1)
    return _make_report(
        list(tqdm(audited, total=len(positions), desc="Auditing conversations", unit=" rows")), auditor, num_rows
    )


def _draw(
    dataset: Examples | IterableDataset, num_rows: int | None, sample_size: int, seed: int
) -> tuple[Examples, list[int]]:
    """Return examples, and the positions of those to audit."""
    if sample_size < 1:
        raise ValueError(f"sample_size must be 1 or more, got {sample_size}.")
    if num_rows is None:
        first = list(islice(dataset, sample_size))
        return first, list(range(len(first)))
    drawn = np.random.default_rng(seed).permutation(num_rows)[:sample_size]
    return dataset, np.sort(drawn).tolist()


@dataclass(slots=True)
class AuditedExample:
    """What one example contains. Of its tokens, only the first prompt is kept."""

    index: int
    error: str | None = None  # why it cannot be trained
    templates: list[TemplateFacts] = field(default_factory=list)  # of its conversation, or of each trajectory
    # counts of each turn that the template renders, and of each sample that can be trained
    turns: list[TurnStats] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # tokens of each sample
    cost: ConversationCost | None = None  # if it can be trained
    recipes: list[RecipeReport] = field(default_factory=list)


class Auditor:
    """Audits examples for a tokenizer or processor, the sizes of a model, and the length to compare samples with."""

    def __init__(
        self,
        examples: Examples,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        shape: ModelShape,
        max_length: int | None,
    ) -> None:
        self.examples, self.shape, self.max_length = examples, shape, max_length
        self.reader, self.tokenizer = as_reader(tokenizer), get_tokenizer(tokenizer)
        self.one_sequence = [OneSequence(self.tokenizer, name) for name in (Recipe.DEFAULT, Recipe.ASSISTANT_ONLY)]
        self.templates: dict[TemplateKey, TemplateFacts] = {}

    def audit_example(self, index: int) -> AuditedExample:
        """Audit one example. Anything wrong with it is recorded, so that the others can still be audited."""
        given = self.examples[index]
        example = {"messages": given} if isinstance(given, list) else dict(given)
        audited = AuditedExample(index)
        try:
            (self._audit_pair if is_pair(example) else self._audit_conversation)(example, audited)
        except DataError as error:
            audited.error = get_reason(error, index)
        except (AssertionError, UnexpectedError):
            raise
        except Exception as error:
            raise unexpected_error(error, index) from error
        return audited

    def _audit_conversation(self, example: Mapping[str, object], audited: AuditedExample) -> None:
        conversations: list[Conversation] = []
        if get_tokenized_turns(example) is None:  # otherwise it has tokens already, and no template is involved
            parts = split_requests(example) or [example]
            conversations = [read_conversation(part, audited.index, self.reader) for part in parts]
        examiners = [self._examine(conversation, audited) for conversation in conversations]
        prefixes = examiners[0].prefixes if len(examiners) == 1 else None
        try:
            samples = example_to_samples(example, audited.index, self.reader, RowSettings(), prefixes=prefixes).samples
        finally:  # turns are counted whether or not they can be trained
            turns = [turn for examiner in examiners for turn in examiner.finish()]
            audited.turns += [replace(turn, turn=number) for number, turn in enumerate(turns, start=1)]
        if not samples:
            raise BadRowError("All its turns have the weight 0, so nothing of it is trained.")
        self._add_samples(samples, audited)
        audited.cost = count_conversation(samples, self.shape)
        if len(conversations) == 1:
            audited.recipes += [recipe.count(conversations[0], samples) for recipe in self.one_sequence]

    def _audit_pair(self, example: Mapping[str, object], audited: AuditedExample) -> None:
        """Add both trajectories of a pair, and the cost of their one tree."""
        pair = example_to_pair(example, audited.index, self.reader, PairSettings())
        for side in () if set(TOKEN_COLUMNS) <= set(example) else split_pair(example, audited.index).values():
            conversation = read_conversation(side, audited.index, self.reader)
            audited.turns += self._examine(conversation, audited).finish()
        for fitted in pair.sides:
            self._add_samples(fitted.samples, audited)
        audited.cost = count_conversation(pair.samples, self.shape)
        refusal = "it is a setting of fine-tuning, and these are preference pairs"
        audited.recipes += [RecipeReport(name=recipe.name, refusal=refusal) for recipe in self.one_sequence]

    def _examine(self, conversation: Conversation, audited: AuditedExample) -> TurnExaminer:
        prefixes = Prefixes.from_conversation(conversation, self.tokenizer)
        if (key := prefixes.template.key) not in self.templates:
            self.templates[key] = survey_template(prefixes.template)
        audited.templates.append(self.templates[key])
        return TurnExaminer(conversation, prefixes)

    def _add_samples(self, samples: Sequence[Sample], audited: AuditedExample) -> None:
        """Add the samples of a conversation, or of one trajectory, that can be trained."""
        audited.turns += [TurnStats.from_sample(one, turn, self.max_length) for turn, one in enumerate(samples, 1)]
        audited.lengths += map(len, samples)
        audited.recipes.append(count_last_turn(samples))


def _audit_examples(auditor: Auditor, positions: list[int], num_proc: int) -> Iterator[AuditedExample]:
    """Audit examples in their order, so that the report does not depend on the number of processes."""
    if num_proc == 1:
        yield from map(auditor.audit_example, positions)
        return
    with (
        # Tokenizers that have used threads would warn in every process forked from theirs.
        patch_environment(tokenizers_parallelism="false"),
        ProcessPoolExecutor(num_proc, initializer=_worker.append, initargs=(auditor,)) as pool,
    ):
        yield from pool.map(_audit_in_worker, positions, chunksize=_BATCH_SIZE)


# A worker gets its auditor once: as an argument, it would be pickled again for every batch.
_worker: list[Auditor] = []


def _audit_in_worker(position: int) -> AuditedExample:
    return _worker[0].audit_example(position)


def _make_report(audited: Sequence[AuditedExample], auditor: Auditor, num_rows: int | None) -> AuditReport:
    costs = [one.cost for one in audited if one.cost is not None]
    turns = [stats for one in audited for stats in one.turns]
    recipes = [recipe for one in audited for recipe in one.recipes]
    lengths = [length for one in audited for length in one.lengths]
    tree_lengths = [cost.by_schedule[Schedule.SINGLE_PASS].tokens for cost in costs]
    coverage = 0.0 if num_rows is None else len(audited) / num_rows
    turn_of = attrgetter("turn")
    return AuditReport(
        num_rows=num_rows,
        num_audited=len(audited),
        num_trainable=len(costs),
        errors=group_errors((one.index, one.error) for one in audited if one.error is not None),
        templates=tuple(Counter(facts for one in audited for facts in one.templates).most_common()),
        all_turns=TurnStats.merge(turns),
        by_turn=tuple(TurnStats.merge(group, turn) for turn, group in groupby(sorted(turns, key=turn_of), turn_of)),
        max_length=auditor.max_length,
        sample_lengths=Lengths.from_values(lengths) if costs else None,
        tree_lengths=Lengths.from_values(tree_lengths) if costs else None,
        num_chains=sum(cost.num_chains for cost in costs),
        sharing_by_turns=sharing_by_turns(costs),
        recipes=(
            *(RecipeReport.merge(recipe.name, recipes, recipe.refusal) for recipe in auditor.one_sequence),
            RecipeReport.merge(Recipe.LAST_TURN, recipes),
        ),
        forecast=make_forecast(costs, auditor.shape, coverage) if costs else None,
    )
