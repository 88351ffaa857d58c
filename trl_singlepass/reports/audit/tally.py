"""What the rows looked at so far hold, and looking at one more."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ...cost.flops import ModelShape
from ...data.bad_rows import reason_of
from ...data.conversations import samples_of
from ...data.settings import RowSettings
from ...data.tokenized_turns import turns_in
from ...rendering.conversation import Conversation
from ...rendering.prefixes import Prefixes
from .counts import SampleSize
from .forecast import ConversationCost, conversation_cost
from .recipes import AssistantOnlyLoss, RecipeCounts, last_turn_only
from .templates import TemplateFacts, TemplateSurvey
from .turns import TurnFacts, turn_facts


@dataclass(slots=True)
class Tally:
    """
    What rows hold. Of the tokens themselves, only first prompts are kept.

    Args:
        num_rows (`int`):
            Rows looked at.
        errors (`list[tuple[int, str]]`):
            Rows that cannot be trained, each with its reason.
        templates (`Counter[TemplateFacts]`):
            Ways in which the template is called.
        turns (`list[list[TurnFacts]]`):
            Turns of each conversation that is rendered.
        sizes (`list[list[SampleSize]]`):
            Samples of each that can be trained.
        costs (`list[ConversationCost]`):
            Work of each of these.
        last_turn (`list[RecipeCounts]`):
            What the last turn alone would train of it.
        assistant_only (`list[RecipeCounts]`):
            What TRL's `assistant_only_loss` would train of it.
        recipe_refusals (`Counter[str]`):
            Reasons why it would not.
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
        """Add what rows after these hold."""
        self.num_rows += later.num_rows
        for name in ("templates", "recipe_refusals"):
            getattr(self, name).update(getattr(later, name))
        for name in ("errors", "turns", "sizes", "costs", "last_turn", "assistant_only"):
            getattr(self, name).extend(getattr(later, name))


class Auditor:
    """
    Looks at rows.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        shape (`ModelShape`):
            Sizes of the model.
    """

    def __init__(self, tokenizer: Any, shape: ModelShape) -> None:
        self.tokenizer, self.shape = tokenizer, shape
        self.recipe, self.survey = AssistantOnlyLoss(tokenizer), TemplateSurvey(tokenizer)

    def look_at(self, index: int, row: dict[str, Any], tally: Tally) -> None:
        """Look at one row. Whatever is wrong with it is noted; it must not keep the others from being looked at."""
        tally.num_rows += 1
        conversation: Conversation | None = None
        prefixes: Prefixes | None = None
        try:
            if turns_in(row) is None:  # else tokens already: no template takes part
                conversation = Conversation.from_row(row)
                prefixes = Prefixes.from_conversation(conversation, self.tokenizer)
                tally.turns.append(turn_facts(conversation, prefixes))
                tally.templates[self.survey.facts(conversation)] += 1
            samples = samples_of(row, index, self.tokenizer, RowSettings(), prefixes=prefixes).samples
            if not samples:
                raise ValueError("All its turns have the weight 0, so nothing of it is trained.")
        except Exception as error:  # a row can be anything, and templates raise what they like
            tally.errors.append((index, reason_of(error, index)))
            return
        tally.sizes.append([SampleSize.of(sample) for sample in samples])
        tally.costs.append(conversation_cost(samples, self.shape))
        tally.last_turn.append(last_turn_only(samples))
        if self.recipe.refusal is None and conversation is not None:
            try:
                tally.assistant_only.append(self.recipe.counts(conversation, samples))
            except Exception as error:  # noted: TRL's training templates refuse what the stock ones render
                tally.recipe_refusals[str(error) or type(error).__name__] += 1
