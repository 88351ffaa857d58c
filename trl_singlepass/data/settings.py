"""What of the training arguments decides what rows a conversation becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..rendering.history import HISTORIES, History
from .selection import parse_train_turns
from .weights import LOSS_REDUCTIONS, LossReduction


OverlongTurns = Literal["truncate", "drop", "error"]
OVERLONG_TURNS: tuple[OverlongTurns, ...] = ("truncate", "drop", "error")
BadRows = Literal["error", "drop"]
BAD_ROWS: tuple[BadRows, ...] = ("error", "drop")


@dataclass(frozen=True, slots=True)
class RowSettings:
    """
    What of the arguments decides what rows a conversation becomes; a change prepares the dataset again.

    Args:
        max_length (`int`, *optional*):
            Longest sample, in tokens.
        max_row_tokens (`int`, *optional*):
            Largest row, in tokens.
        overlong_turns (`str`, *optional*, defaults to `"truncate"`):
            What happens to a turn that is longer than either: `"truncate"`, `"drop"` or `"error"`.
        history (`str`, *optional*, defaults to `"template"`):
            What a turn's context holds of earlier turns' reasoning (see [`render_with_history`]).
        train_turns (`str` or `int`, *optional*, defaults to `"all"`):
            Turns that are trained (see [`select_turns`]).
        loss_reduction (`str`, *optional*, defaults to `"token"`):
            What counts the same: every token, every turn or every conversation (see [`weigh`]).
        reasoning_weight (`float`, *optional*, defaults to `1.0`):
            Factor of the loss of reasoning.
        seed (`int`, *optional*, defaults to `0`):
            Seed of `train_turns="sample:n"`.
    """

    max_length: int | None = None
    max_row_tokens: int | None = None
    overlong_turns: OverlongTurns = "truncate"
    history: History = "template"
    train_turns: str | int = "all"
    loss_reduction: LossReduction = "token"
    reasoning_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        parse_train_turns(self.train_turns)
        for name, choices in (("history", HISTORIES), ("loss_reduction", LOSS_REDUCTIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(choices)}.")
        if not 0 <= self.reasoning_weight < math.inf:
            raise ValueError(f"reasoning_weight={self.reasoning_weight}: expected a number of 0 or more.")
        if self.overlong_turns not in OVERLONG_TURNS:
            raise ValueError(f"overlong_turns={self.overlong_turns!r} is none of {', '.join(OVERLONG_TURNS)}.")

    @property
    def longest_sample(self) -> int | None:
        """Most tokens that a sample may have, if bounded."""
        return None if self.bound is None else getattr(self, self.bound)

    @property
    def bound(self) -> str | None:
        """Which setting bounds a sample: the smaller of the two, if any is set."""
        bounds = [name for name in ("max_length", "max_row_tokens") if getattr(self, name) is not None]
        return min(bounds, key=lambda name: int(getattr(self, name)), default=None)
