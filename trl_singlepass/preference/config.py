"""Arguments of `SinglePassDPOTrainer`: those of `DPOConfig`, and what is its own."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from trl import DPOConfig

from ..data.settings import PairSettings, PairTurns
from ..training.config import SinglePassConfig, check_shared_settings, use_new_names
from ..training.refusals import PAIRS, check
from ..training.situation import Situation
from .collator import TurnWeights


@dataclass
class SinglePassDPOConfig(SinglePassConfig, DPOConfig):
    r"""
    Configuration class for the [`SinglePassDPOTrainer`].

    Every argument of [`~trl.DPOConfig`] keeps its meaning or is refused by name, where a sequence of TRL is one
    **sample**: one turn with its context. Only the default of `max_length` differs. `docs/limits.md` lists what is
    refused.

    The settings of [`SinglePassConfig`] are those of all trainers; these are its own:

    Args:
        packing (`bool`, *optional*):
            Pairs of a batch share rows without padding, and the prefixes that they have in common: `None` and `True`
            change nothing, and `False` is refused. `max_row_tokens` bounds a row.
        train_turns (`str`, *optional*, defaults to `"all"`):
            Turns that log π is taken over: `"all"` after the prompt, the `"last"` one, or those
            `"from_difference"` on, the first turn that the trajectories do not share in an equal context.
        turn_discount (`float`, *optional*):
            Discount factor γ of DMPO (arXiv 2406.14868): later turns count less. `None` counts all alike.
        turn_mean (`bool`, *optional*, defaults to `False`):
            Whether a turn counts with the mean of its tokens' log-probabilities instead of their sum.

    Raises:
        `ValueError`: If a setting cannot be honoured.
    """

    packing: bool = field(  # type: ignore[assignment] # parsers take no bare flag for `bool | None`
        default=None,
        metadata={"help": "Pairs of a batch always share rows: `None` and `True` change nothing, `False` is refused."},
    )
    train_turns: PairTurns = field(
        default=PairTurns.ALL,
        metadata={
            "help": "Turns that log-probabilities are taken over: 'all' after the prompt, the 'last' one, or those "
            "'from_difference' on.",
            "choices": list(PairTurns),
        },
    )
    turn_discount: float | None = field(
        default=None, metadata={"help": "Discount factor of DMPO: later turns count less. `None`: all alike."}
    )
    turn_mean: bool = field(
        default=False,
        metadata={"help": "Whether a turn counts with the mean of its tokens' log-probabilities, not their sum."},
    )

    def __post_init__(self) -> None:
        use_new_names(self)
        super().__post_init__()
        check_shared_settings(self)
        check(Situation(self), PAIRS)
        pair_settings(self)  # checks the choices
        turn_weights(self)


def pair_settings(args: DPOConfig) -> PairSettings:
    """Return the arguments that determine how pairs become rows."""
    return PairSettings(**{setting.name: getattr(args, setting.name) for setting in fields(PairSettings)})


def turn_weights(args: DPOConfig) -> TurnWeights:
    """Return the arguments that weigh the turns of a trajectory."""
    return TurnWeights(args.turn_discount, args.turn_mean)
