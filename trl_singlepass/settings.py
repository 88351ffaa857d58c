"""What of the training arguments decides what rows a conversation becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


OverlongTurns = Literal["truncate", "drop", "error"]
OVERLONG_TURNS: tuple[OverlongTurns, ...] = ("truncate", "drop", "error")


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
    """

    max_length: int | None = None
    max_row_tokens: int | None = None
    overlong_turns: OverlongTurns = "truncate"

    def __post_init__(self) -> None:
        if self.overlong_turns not in OVERLONG_TURNS:
            raise ValueError(f"overlong_turns={self.overlong_turns!r} is none of {', '.join(OVERLONG_TURNS)}.")

    @property
    def longest_sample(self) -> int | None:
        """Most tokens that a sample may have, if bounded."""
        bounds = [bound for bound in (self.max_length, self.max_row_tokens) if bound is not None]
        return min(bounds, default=None)
