"""Training arguments that determine how conversations and pairs become rows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ..rendering.history import HISTORIES, History
from .selection import OverlongTurns, parse_train_turns
from .weights import WEIGHT_RANGE, LossReduction, are_weights


@dataclass(frozen=True, slots=True)
class RowSettings:
    """
    Training arguments that determine how conversations become rows: changing one prepares the dataset again.

    Args:
        max_length (`int`, *optional*):
            Longest sample, in tokens.
        max_row_tokens (`int`, *optional*):
            Largest row, in tokens.
        overlong_turns (`OverlongTurns`, *optional*, defaults to `"truncate"`):
            What happens to a turn that is longer than either.
        history (`str`, *optional*, defaults to `"template"`):
            How much of earlier turns' reasoning a turn's context holds (see [`render_with_history`]).
        train_turns (`str` or `int`, *optional*, defaults to `"all"`):
            Turns that are trained (see [`select_turns`]).
        loss_reduction (`LossReduction`, *optional*, defaults to `"token"`):
            What counts the same in the loss (see [`weigh`]).
        reasoning_weight (`float`, *optional*, defaults to `1.0`):
            Factor of the loss of reasoning.
        seed (`int`, *optional*, defaults to `0`):
            Seed of `train_turns="sample:n"`.

    Raises:
        `ValueError`: If a setting has a value that is not one of its choices.
    """

    max_length: int | None = None
    max_row_tokens: int | None = None
    overlong_turns: OverlongTurns = OverlongTurns.TRUNCATE
    history: History = "template"
    train_turns: str | int = "all"
    loss_reduction: LossReduction = LossReduction.TOKEN
    reasoning_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        parse_train_turns(self.train_turns)
        choices = {"history": HISTORIES, "loss_reduction": [*LossReduction], "overlong_turns": [*OverlongTurns]}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(values)}.")
        # A plain string and the member that equals it must have the same `repr`, which is part of a fingerprint.
        object.__setattr__(self, "loss_reduction", LossReduction(self.loss_reduction))
        object.__setattr__(self, "overlong_turns", OverlongTurns(self.overlong_turns))
        if not are_weights(self.reasoning_weight):
            raise ValueError(f"reasoning_weight={self.reasoning_weight}: expected {WEIGHT_RANGE}.")

    @property
    def longest_sample(self) -> int | None:
        """Most tokens that a sample may have, `None` for any number."""
        return None if self.bound is None else getattr(self, self.bound)

    @property
    def bound(self) -> str | None:
        """Name of the setting that bounds a sample: the smaller one of the two lengths, if any is set."""
        bounds = [name for name in ("max_length", "max_row_tokens") if getattr(self, name) is not None]
        return min(bounds, key=lambda name: int(getattr(self, name)), default=None)


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

    @property
    def bound(self) -> str | None:
        """Name of the setting that bounds a sample (see [`RowSettings.bound`])."""
        return self.for_trajectory().bound
