"""Arguments of `SinglePassSFTTrainer`: those of `SFTConfig`, less what one pass cannot honour."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig


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
        if self.packing and self.max_length is None:
            raise ValueError("packing=True needs max_length: the length of a row, in tokens.")


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
