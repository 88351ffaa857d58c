"""What an audit finds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from ...data.bad_rows import RowErrors
from .counts import Lengths, TurnStats
from .forecast import Forecast, SharingByTurns
from .recipes import RecipeReport
from .templates import TemplateFacts


@dataclass(frozen=True, slots=True)
class AuditFacts:
    """
    What a dataset contains, what its template makes of it, and what training on it costs.

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
