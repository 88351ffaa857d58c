"""Arguments of `SinglePassSFTTrainer`: those of `SFTConfig`, less what one pass cannot honour."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

import trl
from packaging.version import Version
from transformers import TrainingArguments
from trl import SFTConfig

from .settings import HISTORIES, OVERLONG_TURNS, History, OverlongTurns, RowSettings
from .weights import LOSS_REDUCTIONS, LossReduction


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
        history (`str`, *optional*, defaults to `"template"`):
            What a turn's context holds of earlier turns: `"template"`, as the chat template renders it; `"keep"`, all
            reasoning; `"strip"`, no reasoning. A `history` column overrides it row by row.
        train_turns (`str` or `int`, *optional*, defaults to `"all"`):
            Turns that are trained: `"all"`, `"last"`, `n` for the first `n` of each conversation, `"sample:n"` for `n`
            drawn at random. The others are context, and counted in the log.
        loss_reduction (`str`, *optional*, defaults to `"token"`):
            What counts the same in the loss: every `"token"`, every `"turn"` or every `"conversation"`.
        reasoning_weight (`float`, *optional*, defaults to `1.0`):
            Factor of the loss of reasoning, beside 1 for answers and tool calls.
        log_turn_metrics (`bool`, *optional*, defaults to `False`):
            Whether to log loss and accuracy by turn, for reasoning, for answers and for their first token.
        wave_tokens (`int` or `"auto"`, *optional*):
            Largest number of tokens of a row that have activations at the same time. A row that is longer runs in
            waves: the same loss and gradients, in the memory of one wave. `None` runs every row at once; `"auto"`
            takes what free memory allows.
        offload_kv (`bool`, *optional*, defaults to `False`):
            Whether keys and values that wait for later waves, and their gradients, are held on the CPU.

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
    history: History = field(
        default="template",
        metadata={
            "help": "What a turn's context holds of earlier turns: 'template', as the chat template renders it; "
            "'keep', all reasoning; 'strip', no reasoning.",
            "choices": list(HISTORIES),
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
        default="token",
        metadata={
            "help": "What counts the same in the loss: every 'token', every 'turn' or every 'conversation'.",
            "choices": list(LOSS_REDUCTIONS),
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
    wave_tokens: int | str | None = field(
        default=None,
        metadata={
            "help": "Largest number of tokens of a row that have activations at the same time. Longer rows run in "
            "waves: same loss and gradients, memory of one wave. `None`: rows run at once; 'auto': as memory allows."
        },
    )
    offload_kv: bool = field(
        default=False,
        metadata={"help": "Whether keys and values that wait for later waves are held on the CPU."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_waves()
        if self.log_turn_metrics and Version(trl.__version__) < Version("1.15"):
            raise ValueError(f"log_turn_metrics=True needs trl>=1.15, found {trl.__version__}. Upgrade trl.")
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
            history=self.history,
            train_turns=self.train_turns,
            loss_reduction=self.loss_reduction,
            reasoning_weight=self.reasoning_weight,
            seed=self.seed if str(self.train_turns).startswith("sample") else 0,
        )

    def _check_waves(self) -> None:
        if isinstance(self.wave_tokens, str) and self.wave_tokens.isdecimal():
            self.wave_tokens = int(self.wave_tokens)  # a command line brings strings
        tokens = self.wave_tokens
        if not (tokens is None or tokens == "auto" or (isinstance(tokens, int) and tokens > 0)):
            raise ValueError(f"wave_tokens={tokens!r}: expected a number of tokens above 0, 'auto', or None.")
        if self.offload_kv and tokens is None:
            raise ValueError("offload_kv=True moves what waits between waves. Set wave_tokens, or offload_kv=False.")


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


def default_config(model: Any) -> SinglePassSFTConfig:
    """Return the arguments of a trainer that is given none: all defaults, an output folder named after the model."""
    name = model if isinstance(model, str) else model.config._name_or_path
    return SinglePassSFTConfig(f"{name.split('/')[-1]}-SinglePassSFT")


def without_redundant_settings(args: SinglePassSFTConfig) -> SinglePassSFTConfig:
    """
    Turn off what TRL offers for one sequence per conversation and a single pass does by nature.

    Every assistant message is trained and nothing else, which is what `assistant_only_loss` is for; left on, TRL would
    swap the chat template for one that keeps all reasoning. Every row is free of padding already.

    Args:
        args (`SinglePassSFTConfig`):
            Arguments.

    Returns:
        `SinglePassSFTConfig`: A copy.
    """
    args = copy.copy(args)
    args.assistant_only_loss = False
    args.padding_free = False
    return args
