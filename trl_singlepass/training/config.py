"""Arguments of trainers: the settings that all have beside TRL's, and those of `SinglePassSFTTrainer`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Self, TypeVar

import torch
from transformers import PreTrainedModel, TrainingArguments, logging
from trl import SFTConfig

from ..data.bad_rows import BadRows
from ..data.selection import OverlongTurns
from ..data.settings import RowSettings
from ..data.weights import LossReduction
from ..rendering.history import HISTORIES, History
from .refusals import OLDER_TRL, check
from .situation import Situation


logger = logging.get_logger(__name__)
Args = TypeVar("Args", bound=TrainingArguments)
# TRL's length of a packed row, where nothing else is set.
_TRL_MAX_LENGTH: int = SFTConfig.__dataclass_fields__["max_length"].default


@dataclass
class EngineConfig:
    r"""
    How the rows of a batch run: the settings that every trainer has beside TRL's.

    Args:
        max_row_tokens (`int`, *optional*):
            Largest row, in tokens: the setting that bounds memory. The completions of a batch fill as many rows as
            they need, which costs one more forward of the policy. `None` makes one row of a batch.
        self_check (`bool`, *optional*, defaults to `True`):
            Whether a small row is run as a tree and as separate samples before the first step, and the run stopped if
            they differ. `False` trains a model that nobody has measured; the log says so.
        wave_tokens (`int` or `"auto"`, *optional*):
            Largest number of tokens of a row that have activations at the same time. A longer row runs in waves, with
            the same loss and gradients, in the memory of one wave. For pairs and completions, this costs one more
            forward of the policy, as several rows do. `None` runs every row at once; `"auto"` chooses what free memory
            allows.
        offload_kv (`bool`, *optional*, defaults to `False`):
            Whether to keep keys and values that wait for later waves, and their gradients, on the CPU.
    """

    max_row_tokens: int | None = field(default=None, metadata={"help": "Largest row, in tokens. `None`: no bound."})
    self_check: bool = field(
        default=True,
        metadata={
            "help": "Whether to measure before the first step that the model computes on a tree what it computes on "
            "separate samples, and to stop if not."
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

    def __new__(cls, *_: object, **settings: object) -> Self:
        """Suggest the setting that a misspelt one looks like; the constructor of a dataclass does not."""
        for name in settings:
            if name not in cls.__dataclass_fields__:
                close = get_close_matches(name, cls.__dataclass_fields__, n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise TypeError(f"{cls.__name__} has no setting called {name}.{hint}")
        return super().__new__(cls)


@dataclass
class SinglePassConfig(EngineConfig):
    r"""
    The settings of trainers whose datasets become rows; a sequence of TRL is one **sample** here: one turn with its
    context. Those of [`EngineConfig`] come with them.

    Args:
        max_length (`int`, *optional*):
            Longest sample, in tokens. Longer samples lose the tokens at depth `max_length` and beyond, as with TRL's
            `truncation_mode="keep_start"`; what is lost is counted in the log. `None` keeps every sample whole.
        max_row_tokens (`int`, *optional*):
            Largest row, in tokens: the setting that bounds memory. A conversation or pair with a larger tree is split
            between turns into several rows that repeat as little history as possible. With packing, rows of
            conversations are filled up to it, and it defaults to `max_length`, or to TRL's length of a row if that is
            `None`. The pairs of a batch fill as many rows as they need; a batch of several rows costs one more forward
            of the policy. Otherwise, `None` never splits, and makes one row of a batch of pairs.
        overlong_turns (`str`, *optional*, defaults to `"truncate"`):
            What happens to a turn that is longer than `max_length` or `max_row_tokens`: `"truncate"` trains its
            beginning, `"drop"` leaves it out, `"error"` stops. What is lost is counted in the log, and a pair of which
            a side has nothing left is dropped.
        bad_rows (`str`, *optional*, defaults to `"error"`):
            What happens to examples that cannot be trained, such as one without an assistant message: `"error"` names
            all of them with their reasons and stops (in a stream, at the first), `"drop"` leaves them out and counts
            them in the log.
        history (`str`, *optional*, defaults to `"template"`):
            What a turn's context holds of earlier turns: `"template"`, what the chat template renders; `"keep"`, all
            reasoning; `"strip"`, no reasoning. A `history` column overrides it example by example.
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
            "help": "Largest row, in tokens. Larger conversations and pairs are split between turns into several "
            "rows. With `packing`, rows of conversations are filled up to it, and it defaults to `max_length`. `None` "
            "never splits, and makes one row of a batch of pairs."
        },
    )
    overlong_turns: OverlongTurns = field(
        default=OverlongTurns.TRUNCATE,
        metadata={
            "help": "What happens to turns longer than `max_length` or `max_row_tokens`: 'truncate', 'drop', 'error'.",
            "choices": list(OverlongTurns),
        },
    )
    bad_rows: BadRows = field(
        default=BadRows.ERROR,
        metadata={
            "help": "What happens to examples that cannot be trained: 'error' names all of them and stops, 'drop' "
            "leaves them out and counts them in the log.",
            "choices": list(BadRows),
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


def check_shared_settings(args: TrainingArguments) -> None:
    """Check the settings of trainers whose datasets become rows."""
    check_engine_settings(args)
    _check_has_room(args, "max_length")
    if args.bad_rows not in tuple(BadRows):
        raise ValueError(f"bad_rows={args.bad_rows!r} is not one of {', '.join(BadRows)}.")


def check_engine_settings(args: TrainingArguments) -> None:
    """Check the settings that all trainers have; a command line brings numbers as strings, which become numbers."""
    # PyTorch cannot pin memory without an accelerator, and warns in each dataloader that it does not.
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False
    _check_has_room(args, "max_row_tokens")
    if isinstance(tokens := args.wave_tokens, str) and tokens.isdecimal():
        tokens = args.wave_tokens = int(tokens)
    if not (tokens is None or tokens == "auto" or (isinstance(tokens, int) and tokens > 0)):
        raise ValueError(f"wave_tokens={tokens!r}: expected a number of tokens above 0, 'auto', or None.")
    if args.offload_kv and tokens is None:
        raise ValueError("offload_kv=True moves what waits between waves. Set wave_tokens, or offload_kv=False.")


def _check_has_room(args: TrainingArguments, name: str) -> None:
    value: int | None = getattr(args, name)
    if value is not None and value < 2:
        raise ValueError(f"{name}={value} leaves no room for a token and its target. Set it to 2 or more.")


def use_new_names(args: TrainingArguments) -> None:
    """Move TRL's default to the name that transformers has for it since 5.24, which warns about the old one."""
    default = type(args).__dataclass_fields__["gradient_checkpointing"].default
    if getattr(args, "activation_checkpointing", False) is None and args.gradient_checkpointing is default:
        args.activation_checkpointing = default


def complete_config(args: Args | None, config: type[Args], model: str | PreTrainedModel) -> Args:
    """Return arguments, or all defaults, with the settings of a configuration that they lack at their defaults."""
    source: str = model if isinstance(model, str) else model.config._name_or_path
    folder = f"{source.split('/')[-1]}-{config.__name__.removesuffix('Config')}"
    completed: Args = config(folder) if args is None else args
    for setting in () if args is None else fields(config):
        if not hasattr(completed, setting.name):
            assert setting.default is not MISSING, "every setting of its own has a default"
            setattr(completed, setting.name, setting.default)
    return completed


def own_settings(config: type[EngineConfig]) -> list[str]:
    """Return the names of the settings that a configuration adds to TRL's, or whose defaults it changes."""
    own = [cls for cls in reversed(config.__mro__) if issubclass(cls, EngineConfig)]
    return list(dict.fromkeys(name for cls in own for name in cls.__annotations__))


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
    """Return the length of packed rows in tokens: the one that is set, or TRL's default, which is logged once."""
    length: int | None = args.max_row_tokens or args.max_length
    if length is not None:
        return length
    logger.warning_once(
        f"Packing without max_length or max_row_tokens: rows hold {_TRL_MAX_LENGTH} tokens, TRL's default, and longer "
        "turns follow overlong_turns. Set max_row_tokens to choose another length."
    )
    return _TRL_MAX_LENGTH


def complete_sft_config(args: TrainingArguments | None, model: str | PreTrainedModel) -> SFTConfig:
    """
    Return the arguments of an SFT trainer as [`complete_config`] does.

    Plain [`~transformers.TrainingArguments`] are copied to a [`SinglePassSFTConfig`], as TRL copies them to an
    [`~trl.SFTConfig`]. Fields of theirs that it lacks raise `ValueError`.
    """
    if args is None or isinstance(args, SFTConfig):
        return complete_config(args, SinglePassSFTConfig, model)
    # Not through `to_dict`, which masks every field whose name ends in `_token`, `hub_token` among them.
    values: dict[str, Any] = {setting.name: getattr(args, setting.name) for setting in fields(args) if setting.init}
    unknown = sorted(values.keys() - {setting.name for setting in fields(SinglePassSFTConfig)})
    if unknown:
        raise ValueError(
            f"{type(args).__name__} has fields that SFTConfig does not have: {', '.join(unknown)}. Derive the class "
            "from SinglePassSFTConfig, or pass a SinglePassSFTConfig."
        )
    return SinglePassSFTConfig(**values)
