"""Audits one row at a time and keeps a running tally."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...cost.flops import ModelShape
from ...data.bad_rows import BadRowError, UnexpectedError, get_reason, unexpected_error
from ...data.conversations import example_to_samples
from ...data.settings import RowSettings
from ...data.tokenized_turns import get_tokenized_turns
from ...data.vision import ConversationReader, as_reader, get_tokenizer
from ...preference.pairs import TOKEN_COLUMNS, example_to_pair, is_pair, split_pair
from ...preference.settings import PairSettings
from ...rendering.conversation import Conversation
from ...rendering.prefixes import Prefixes
from ...trees.errors import DataError
from .counts import SampleSize
from .forecast import ConversationCost, count_conversation
from .recipes import AssistantOnlyLoss, RecipeCounts, count_last_turn
from .templates import TemplateFacts, TemplateSurvey
from .turns import TurnExaminer, TurnFacts


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from ...trees.sample import Sample


_NO_RECIPE = "it is not counted for conversations with images"
_NO_PAIRS = "it is a setting of fine-tuning, and these are preference pairs"


@dataclass(slots=True)
class Tally:
    """
    What the audited rows contain. Of their tokens, only first prompts are kept.

    Args:
        num_rows (`int`):
            Number of audited rows.
        errors (`list[tuple[int, str]]`):
            Rows that cannot be trained, each with its reason.
        templates (`Counter[TemplateFacts]`):
            What the template does, by number of conversations.
        turns (`list[list[TurnFacts]]`):
            Turns of each conversation that can be rendered.
        sizes (`list[list[SampleSize]]`):
            Sizes of the samples of each conversation that can be trained.
        costs (`list[ConversationCost]`):
            Cost of each of these conversations.
        last_turn (`list[RecipeCounts]`):
            What the last turn alone would train of each.
        assistant_only (`list[RecipeCounts]`):
            What TRL's `assistant_only_loss` would train of each it can be applied to.
        recipe_refusals (`Counter[str]`):
            Why it cannot be applied to the others.
    """

    num_rows: int = 0
    errors: list[tuple[int, str]] = field(default_factory=list)
    templates: Counter[TemplateFacts] = field(default_factory=Counter)
    turns: list[list[TurnFacts]] = field(default_factory=list)
    sizes: list[list[SampleSize]] = field(default_factory=list)
    costs: list[ConversationCost] = field(default_factory=list)
    last_turn: list[RecipeCounts] = field(default_factory=list)
    assistant_only: list[RecipeCounts] = field(default_factory=list)
    recipe_refusals: Counter[str] = field(default_factory=Counter)

    def merge(self, later: Tally) -> None:
        """Add the tally of the rows after these."""
        self.num_rows += later.num_rows
        for name in ("templates", "recipe_refusals"):
            getattr(self, name).update(getattr(later, name))
        for name in ("errors", "turns", "sizes", "costs", "last_turn", "assistant_only"):
            getattr(self, name).extend(getattr(later, name))


class Auditor:
    """
    Audits rows.

    Args:
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Tokenizer with a chat template; the processor for conversations with images.
        shape (`ModelShape`):
            Sizes of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, shape: ModelShape) -> None:
        self.reader, self.tokenizer, self.shape = as_reader(tokenizer), get_tokenizer(tokenizer), shape
        self.recipe, self.survey = AssistantOnlyLoss(self.tokenizer), TemplateSurvey(self.tokenizer)

    def add_row(self, index: int, row: Mapping[str, object], tally: Tally) -> None:
        """Add one row to a tally. Anything wrong with it is recorded, so that the other rows can still be audited."""
        tally.num_rows += 1
        row = dict(row)
        conversation: Conversation | None = None
        if is_pair(row):
            self._add_pair(index, row, tally)
            return
        try:
            if get_tokenized_turns(row) is None:  # otherwise it has tokens already, and no template is involved
                conversation = self._read(index, row)
            samples = self._to_samples(index, row, conversation, tally)
            if not samples:
                raise BadRowError("All its turns have the weight 0, so nothing of it is trained.")
        except DataError as error:
            tally.errors.append((index, get_reason(error, index)))
            return
        except (AssertionError, UnexpectedError):
            raise
        except Exception as error:
            raise unexpected_error(error, index) from error
        tally.sizes.append([SampleSize.from_sample(sample) for sample in samples])
        tally.costs.append(count_conversation(samples, self.shape))
        tally.last_turn.append(count_last_turn(samples))
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
            tally.turns.append(examiner.finish())

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
            except (
                Exception
            ) as error:  # recorded: TRL's training templates refuse some rows that the stock ones render
                tally.recipe_refusals[str(error) or type(error).__name__] += 1

    def _add_pair(self, index: int, row: Mapping[str, object], tally: Tally) -> None:
        """Add both trajectories of a pair, and the cost of their one tree."""
        try:
            pair = example_to_pair(row, index, self.reader, PairSettings())
            for example in () if set(TOKEN_COLUMNS) <= set(row) else split_pair(row, index).values():
                tally.turns.append(self._examine(self._read(index, example), tally).finish())
        except DataError as error:
            tally.errors.append((index, get_reason(error, index)))
            return
        except (AssertionError, UnexpectedError):
            raise
        except Exception as error:
            raise unexpected_error(error, index) from error
        for side in pair.sides:
            tally.sizes.append([SampleSize.from_sample(sample) for sample in side.samples])
            tally.last_turn.append(count_last_turn(side.samples))
        tally.costs.append(count_conversation(pair.samples, self.shape))
        tally.recipe_refusals[_NO_PAIRS] += 1
