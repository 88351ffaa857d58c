"""Arguments of `SinglePassSFTTrainer`: those of `SFTConfig`, and what is its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedModel, TrainingArguments, logging
from trl import SFTConfig

from ..data.settings import RowSettings
from ..data.weights import LossReduction
from .base_config import SinglePassConfig, add_settings, check_shared_settings, short_name, use_new_names
from .refusals import OLDER_TRL, check
from .situation import Situation


logger = logging.get_logger(__name__)
# TRL's length of a packed row, where nothing else is set.
_TRL_MAX_LENGTH: int = SFTConfig.__dataclass_fields__["max_length"].default


@dataclass
class SinglePassSFTConfig(SinglePassConfig, SFTConfig):
    r"""
    Configuration class for the [`SinglePassSFTTrainer`].

    Every argument of [`~trl.SFTConfig`] keeps its meaning, where a sequence of TRL is one **sample**: one turn with
    its context. Only the defaults of `max_length` and `assistant_only_loss` differ. `docs/training.md` says which
    arguments conversations follow, which have no effect on them and which are refused.

    The settings of [`SinglePassConfig`] are those of all trainers; these are its own:

    Args:
        assistant_only_loss (`bool`, *optional*):
            Conversations are trained on their assistant messages and nothing else: `None` and `True` change nothing,
            and `False` is refused.
        train_turns (`str` or `int`, *optional*, defaults to `"all"`):
            Turns to train: `"all"`, `"last"`, `n` for the first `n` of each conversation, `"sample:n"` for `n` drawn
            at random. The others are context, and counted in the log.
        loss_reduction (`str`, *optional*, defaults to `"token"`):
            What has equal weight in the loss: every `"token"`, every `"turn"` or every `"conversation"`.
        reasoning_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the loss on reasoning, relative to 1 for answers and tool calls.
        log_turn_metrics (`bool`, *optional*, defaults to `False`):
            Whether to log loss and accuracy by turn, for reasoning, for answers and for their first token.

    Raises:
        `ValueError`: If a setting cannot be honoured in a single pass.
    """

    assistant_only_loss: bool = field(  # type: ignore[assignment] # parsers take no bare flag for `bool | None`
        default=None,
        metadata={
            "help": "Conversations are trained on their assistant messages and nothing else: `None` and `True` change "
            "nothing, `False` is refused."
        },
    )
    train_turns: str = field(  # an int is fine as well, but a parser of arguments can only offer one type
        default="all",
        metadata={
            "help": "Turns that are trained: 'all', 'last', n for the first n of each conversation, 'sample:n' for n "
            "drawn at random. The others are context."
        },
    )
    loss_reduction: LossReduction = field(
        default=LossReduction.TOKEN,
        metadata={
            "help": "What counts the same in the loss: every 'token', every 'turn' or every 'conversation'.",
            "choices": list(LossReduction),
        },
    )
    reasoning_weight: float = field(
        default=1.0, metadata={"help": "Factor of the loss of reasoning, beside 1 for answers and tool calls."}
    )
    log_turn_metrics: bool = field(
        default=False,
        metadata={
            "help": "Whether to log loss and accuracy by turn, for reasoning, for answers and for their first token."
        },
    )

    def __post_init__(self) -> None:
        use_new_names(self)
        super().__post_init__()
        check_shared_settings(self)
        check(Situation(self), OLDER_TRL)
        self.row_settings()  # checks the choices of its own settings

    def row_settings(self, packing: bool = False) -> RowSettings:
        """Return the arguments that determine how conversations become rows."""
        return RowSettings(
            max_length=self.max_length,
            max_row_tokens=packed_length(self) if packing else self.max_row_tokens,
            overlong_turns=self.overlong_turns,
            history=self.history,
            train_turns=self.train_turns,
            loss_reduction=self.loss_reduction,
            reasoning_weight=self.reasoning_weight,
            seed=self.seed if str(self.train_turns).startswith("sample") else 0,
        )


def packed_length(args: SFTConfig) -> int:
    """
    Return the length to which packed rows are filled, in tokens: the one that is set, or TRL's default, which is
    logged once.
    """
    length: int | None = args.max_row_tokens or args.max_length
    if length is not None:
        return length
    logger.warning_once(
        f"Packing without max_length or max_row_tokens: rows hold {_TRL_MAX_LENGTH} tokens, TRL's default, and longer "
        "turns follow overlong_turns. Set max_row_tokens to choose another length."
    )
    return _TRL_MAX_LENGTH


def with_packed_length(args: SFTConfig) -> SFTConfig:
    """Return arguments for TRL's packing of plain text, which reads the length of a row from `max_length`."""
    if args.max_length is not None:
        return args
    args = copy.copy(args)
    args.max_length = packed_length(args)
    return args


def as_single_pass_config(args: TrainingArguments) -> SFTConfig:
    """
    Return the arguments of a trainer with the settings of a single pass.

    An [`~trl.SFTConfig`], or an instance of a subclass, is returned itself, so that later changes to it take effect;
    it gets the settings that it lacks, at their defaults. Plain [`~transformers.TrainingArguments`] are copied to a
    [`SinglePassSFTConfig`], as TRL copies them to an [`~trl.SFTConfig`]. Fields of theirs that [`~trl.SFTConfig`]
    lacks raise `ValueError`.
    """
    if not isinstance(args, SFTConfig):
        return _copied(args)
    return add_settings(args, SinglePassSFTConfig)


def _copied(args: TrainingArguments) -> SinglePassSFTConfig:
    # Not through `to_dict`, which masks every field whose name ends in `_token`, `hub_token` among them.
    values: dict[str, Any] = {setting.name: getattr(args, setting.name) for setting in fields(args) if setting.init}
    unknown = sorted(values.keys() - {setting.name for setting in fields(SinglePassSFTConfig)})
    if unknown:
        raise ValueError(
            f"{type(args).__name__} has fields that SFTConfig does not have: {', '.join(unknown)}. Derive the class "
            "from SinglePassSFTConfig, or pass a SinglePassSFTConfig."
        )
    return SinglePassSFTConfig(**values)


def default_config(model: str | PreTrainedModel) -> SinglePassSFTConfig:
    """Return the arguments of a trainer that gets none: all defaults, with an output folder named after the model."""
    return SinglePassSFTConfig(f"{short_name(model)}-SinglePassSFT")


@contextmanager
def without_redundant_settings(args: SFTConfig) -> Iterator[None]:
    """
    Turn off, within a block, settings of TRL that a single pass fulfils anyway.

    It trains every assistant message and nothing else, as `assistant_only_loss` asks; with it, TRL would replace the
    chat template by one that keeps all reasoning. Its rows have no padding, as `padding_free` asks. The user's own
    arguments are restored after the block.
    """
    given = {name: getattr(args, name) for name in ("assistant_only_loss", "padding_free")}
    args.assistant_only_loss = args.padding_free = None
    try:
        yield
    finally:
        for name, value in given.items():
            setattr(args, name, value)
