"""What the configurations of all trainers have in common: settings, their checks, and how TRL's own get them."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from typing import Self, TypeVar

import torch
from transformers import PreTrainedModel, TrainingArguments

from ..data.bad_rows import BadRows
from ..data.selection import OverlongTurns
from ..rendering.history import HISTORIES, History


Args = TypeVar("Args", bound=TrainingArguments)


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
    if args.max_length is not None and args.max_length < 2:
        raise ValueError(_too_short("max_length", args.max_length))
    if args.bad_rows not in tuple(BadRows):
        raise ValueError(f"bad_rows={args.bad_rows!r} is not one of {', '.join(BadRows)}.")


def check_engine_settings(args: TrainingArguments) -> None:
    """Check the settings that all trainers have; a command line brings numbers as strings, which become numbers."""
    # PyTorch cannot pin memory without an accelerator, and warns in each dataloader that it does not.
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False
    if args.max_row_tokens is not None and args.max_row_tokens < 2:
        raise ValueError(_too_short("max_row_tokens", args.max_row_tokens))
    if isinstance(tokens := args.wave_tokens, str) and tokens.isdecimal():
        tokens = args.wave_tokens = int(tokens)
    if not (tokens is None or tokens == "auto" or (isinstance(tokens, int) and tokens > 0)):
        raise ValueError(f"wave_tokens={tokens!r}: expected a number of tokens above 0, 'auto', or None.")
    if args.offload_kv and tokens is None:
        raise ValueError("offload_kv=True moves what waits between waves. Set wave_tokens, or offload_kv=False.")


def _too_short(name: str, value: int) -> str:
    return f"{name}={value} leaves no room for a token and its target. Set it to 2 or more."


def use_new_names(args: TrainingArguments) -> None:
    """Move TRL's default to the name that transformers has for it since 5.24, which warns about the old one."""
    default = type(args).__dataclass_fields__["gradient_checkpointing"].default
    if getattr(args, "activation_checkpointing", False) is None and args.gradient_checkpointing is default:
        args.activation_checkpointing = default


def add_settings(args: Args, config: type[EngineConfig]) -> Args:
    """Return arguments themselves, with the settings of a configuration that they lack at their defaults."""
    for setting in fields(config):
        if not hasattr(args, setting.name):
            assert setting.default is not MISSING, "every setting of its own has a default"
            setattr(args, setting.name, setting.default)
    return args


def own_settings(config: type[EngineConfig]) -> list[str]:
    """Return the names of the settings that a configuration adds to TRL's, or whose defaults it changes."""
    own = [cls for cls in reversed(config.__mro__) if issubclass(cls, EngineConfig)]
    return list(dict.fromkeys(name for cls in own for name in cls.__annotations__))


def short_name(model: str | PreTrainedModel) -> str:
    """Return the name of a model without the folder or the organisation that it is in."""
    name: str = model if isinstance(model, str) else model.config._name_or_path
    return name.split("/")[-1]
