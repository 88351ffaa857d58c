"""What an audit finds, as numbers: the dataset, what its template makes of it, and what training it costs."""

from __future__ import annotations

from dataclasses import dataclass

from ...data.bad_rows import RowErrors
from .counts import Lengths, SharingByTurns, TurnStats
from .forecast import Forecast
from .templates import TemplateFacts


@dataclass(frozen=True, slots=True)
class RecipeReport:
    """
    What another recipe trains of the conversations that can be trained.

    Args:
        name (`str`):
            The recipe.
        conversations (`int`):
            Conversations that it can be applied to.
        refusal (`str`, *optional*):
            Why it cannot be applied to the others, or to any.
        completion_tokens (`int`):
            Completion tokens that there are to train.
        reasoning_tokens (`int`):
            Those of them that are reasoning.
        trained_tokens (`int`):
            Tokens that the recipe trains.
        unlike_inference (`int`):
            Those of them whose context the model does not see at inference, or that it does not write itself.
        reasoning_not_trained (`int`):
            Reasoning tokens that it trains in no context.
    """

    name: str
    conversations: int
    refusal: str | None
    completion_tokens: int
    reasoning_tokens: int
    trained_tokens: int
    unlike_inference: int
    reasoning_not_trained: int


@dataclass(frozen=True, slots=True)
class AuditFacts:
    """
    What a dataset holds, what its template makes of it, and what training it costs.

    Args:
        num_rows (`int`, *optional*):
            Rows of the dataset; `None` for a stream.
        num_audited (`int`):
            Rows that were looked at: all, a random sample, or the first ones of a stream.
        num_trainable (`int`):
            Those of them that can be trained.
        errors (`tuple[RowErrors, ...]`):
            Why the others cannot, the most frequent reason first.
        templates (`tuple[tuple[TemplateFacts, int], ...]`):
            What the template does, with the number of conversations; several where arguments of the template change
            it.
        all_turns (`TurnStats`):
            Counts over all turns.
        by_turn (`tuple[TurnStats, ...]`):
            Counts by the turn's place in its conversation.
        max_length (`int`, *optional*):
            Length in tokens that samples were compared with.
        sample_lengths (`Lengths`, *optional*):
            Tokens per sample; `None` if no row can be trained, as for all that follows.
        tree_lengths (`Lengths`, *optional*):
            Tokens per tree.
        num_chains (`int`):
            Samples that no other sample begins with: the leaves of the trees.
        sharing_by_turns (`tuple[SharingByTurns, ...]`):
            Sharing by the number of turns of a conversation.
        recipes (`tuple[RecipeReport, ...]`):
            What other recipes would do with the same conversations.
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
