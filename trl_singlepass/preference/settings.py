"""Training arguments that determine how pairs become rows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ..data.selection import OverlongTurns
from ..data.settings import RowSettings
from ..rendering.history import History


class PairTurns(StrEnum):
    """Which turns of a trajectory log π is taken over."""

    ALL = "all"
    """Every assistant turn after the prompt."""
    LAST = "last"
    """The last turn; those before it are context."""
    FROM_DIFFERENCE = "from_difference"
    """The turns from the first one on that the two trajectories do not share in an equal context."""


@dataclass(frozen=True, slots=True)
class PairSettings:
    """Training arguments that determine how pairs become rows: changing one prepares the dataset again."""

    max_length: int | None = None  # longest sample (one turn with its context), in tokens
    max_row_tokens: int | None = None
    overlong_turns: OverlongTurns = OverlongTurns.TRUNCATE  # what happens to a turn that is longer than either
    # how much of earlier turns' reasoning a turn's context holds (see [`render_with_history`])
    history: History = "template"
    train_turns: PairTurns = PairTurns.ALL  # which turns log π is taken over

    def __post_init__(self) -> None:
        if self.train_turns not in tuple(PairTurns):
            raise ValueError(f"train_turns={self.train_turns!r} is not one of {', '.join(PairTurns)}.")
        # A plain string and the member that equals it must have the same `repr`, which is part of a fingerprint.
        object.__setattr__(self, "train_turns", PairTurns(self.train_turns))
        object.__setattr__(self, "overlong_turns", self.for_trajectory().overlong_turns)

    def for_trajectory(self) -> RowSettings:
        """Return the settings by which the turns of one trajectory become samples."""
        return RowSettings(
            max_length=self.max_length,
            max_row_tokens=self.max_row_tokens,
            overlong_turns=self.overlong_turns,
            history=self.history,
            train_turns="last" if self.train_turns == PairTurns.LAST else "all",
        )
