"""Arguments of `SinglePassSFTTrainer`: those of `SFTConfig`, less what one pass cannot honour."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig

from .settings import OVERLONG_TURNS, OverlongTurns, RowSettings


@dataclass
class SinglePassSFTConfig(SFTConfig):
    r"""
    Configuration class for the [`SinglePassSFTTrainer`].

    Every argument of [`~trl.SFTConfig`] keeps its meaning, where a sequence of TRL is one **sample**: one turn with
    its context. Only the default of `max_length` differs.

    Args:
        max_length (`int`, *optional*):
            Longest sample, in tokens. Longer samples lose the tokens at depth `max_length` and beyond, as with TRL's
            `truncation_mode="keep_start"`; what is lost is counted in the log. `None` keeps every sample whole.
        max_row_tokens (`int`, *optional*):
            Largest row, in tokens: the knob for memory. A conversation whose tree is larger is split at turn borders
            into several rows that repeat as little history as possible. With packing, rows are filled up to it, and it
            defaults to `max_length`, TRL's length of a row; otherwise `None`, which never splits.
        overlong_turns (`str`, *optional*, defaults to `"truncate"`):
            What happens to a turn that is longer than `max_length` or `max_row_tokens`: `"truncate"` trains its
            beginning, `"drop"` leaves it out, `"error"` stops. What is lost is counted in the log.

    Raises:
        `ValueError`: If a setting cannot be honoured in a single pass.
    """

    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest sample (one turn with its context), in tokens. Longer samples are truncated at the end, "
            "and what is lost is counted in the log. `None` keeps every sample whole."
        },
    )

    max_row_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Largest row, in tokens. Larger conversations are split at turn borders into several rows; with "
            "`packing`, rows are filled up to it, and it defaults to `max_length`. `None` never splits."
        },
    )
    overlong_turns: OverlongTurns = field(
        default="truncate",
        metadata={
            "help": "What happens to turns longer than `max_length` or `max_row_tokens`: 'truncate', 'drop', 'error'.",
            "choices": list(OVERLONG_TURNS),
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.truncation_mode != "keep_start":
            raise ValueError(
                f"truncation_mode={self.truncation_mode!r} would give each turn another start, and turns of one "
                "conversation could no longer share it. Use truncation_mode='keep_start', or max_length=None."
            )
        if self.packing and self.packing_strategy != "bfd":
            raise ValueError(
                f"packing_strategy={self.packing_strategy!r} cuts sequences anywhere, which would tear a tree apart. "
                "Use packing_strategy='bfd', which packs whole conversations."
            )
        for name in ("packing", "eval_packing"):
            if getattr(self, name) and self.max_row_tokens is None and self.max_length is None:
                raise ValueError(f"{name}=True needs max_row_tokens (or max_length): the size of a row, in tokens.")
        for name in ("max_length", "max_row_tokens"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name}={value} leaves no room for a token and its target. Set it to 2 or more.")
        self.row_settings()  # refuses what is none of its choices

    def row_settings(self, packing: bool = False) -> RowSettings:
        """Return what of the arguments decides what rows a conversation becomes."""
        default = self.max_length if packing else None
        return RowSettings(
            max_length=self.max_length,
            max_row_tokens=self.max_row_tokens or default,
            overlong_turns=self.overlong_turns,
        )


def as_single_pass_config(args: TrainingArguments) -> SinglePassSFTConfig:
    """
    Return arguments of another trainer as those of [`SinglePassSFTTrainer`], all values kept.

    Args:
        args (`transformers.TrainingArguments`):
            Arguments, [`~trl.SFTConfig`] or plainer ones.

    Returns:
        `SinglePassSFTConfig`: The same values.

    Raises:
        `ValueError`: If a setting cannot be honoured in a single pass.
    """
    if isinstance(args, SinglePassSFTConfig):
        return args
    # Not through `to_dict`, which masks every field whose name ends in `_token`, `eos_token` among them.
    values: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(args) if f.init}
    known = {f.name for f in fields(SinglePassSFTConfig)}
    return SinglePassSFTConfig(**{name: value for name, value in values.items() if name in known})
