"""
What a single pass refuses: one table, from which errors and `docs/limits.md` are printed.

A line of the table says where it applies, which setting it refuses and when, why, and what to do instead. Its texts
are Markdown; errors are printed without the backticks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import trl
from packaging.version import Version

from .situation import PREFETCHED, Situation


Found: TypeAlias = str | bool | None
"""What a predicate returns: whether the setting is refused, or its name with the value that is."""


@dataclass(frozen=True)
class Scope:
    """Where refusals apply: a heading for the page, the words of an error, and a way out that all of them have."""

    title: str
    words: str  # `{setting}`: by which rows run in parts
    otherwise: str = ""


@dataclass(frozen=True)
class Refusal:
    """A setting that does not work in a scope."""

    scope: Scope
    setting: str
    when: Callable[[Situation], Found]
    why: str
    instead: str
    error: type[Exception] = ValueError


def check(situation: Situation, *scopes: Scope) -> None:
    """Raise the error of the first refusal that applies in some scopes."""
    for refusal in REFUSALS:
        found = refusal.scope in scopes and refusal.when(situation)
        if found:
            raise refusal.error(_message(refusal, found, situation))


def _message(refusal: Refusal, found: str | bool, situation: Situation) -> str:
    what = found if isinstance(found, str) else refusal.setting
    words, otherwise = (
        text.format(setting=situation.setting) for text in (refusal.scope.words, refusal.scope.otherwise)
    )
    return f"{what} does not work {words}: {refusal.why}. {refusal.instead}{otherwise}.".replace("`", "")


def check_parts(situation: Situation) -> None:
    """Refuse what does not go with `wave_tokens`, or with `max_row_tokens` of pairs, whichever is set."""
    check(situation, *([WAVES] if situation.args.wave_tokens is not None else []), PARTS)


# The table -----------------------------------------------------------------------------------------------------------


def _trl_before(release: str) -> Callable[[Situation], Found]:
    return lambda _: Version(trl.__version__) < Version(release) and f"trl {trl.__version__}"


def _updates_during_backward(situation: Situation) -> Found:
    optimizer = str(getattr(situation.args.optim, "value", situation.args.optim))
    return (optimizer in ("lomo", "adalomo") or "layerwise" in optimizer) and f"optim={optimizer!r}"


WAVES = Scope("Waves (`wave_tokens`)", "with {setting}", ", or set {setting}=None")
PARTS = Scope(
    "Rows that run in parts (`wave_tokens`, and `max_row_tokens` of pairs)",
    "with {setting}",
    ", or set {setting}=None",
)
_NOISE = "tokens that run twice would get different noise each time"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        WAVES,
        "`trl` before 1.16",
        _trl_before("1.16"),
        "it has no fused head that takes shifted labels",
        "Upgrade to `trl>=1.16`",
    ),
    Refusal(
        WAVES,
        "`label_smoothing_factor`",
        lambda run: bool(getattr(run.args, "label_smoothing_factor", 0)),
        "it reads the logits of the whole row",
        "Set it to 0",
    ),
    Refusal(
        WAVES,
        "`compute_loss_func`",
        lambda run: run.compute_loss_func is not None,
        "it reads the logits of the whole row",
        "Leave it unset",
    ),
    Refusal(
        WAVES,
        "`torch_compile`",
        lambda run: run.args.torch_compile,
        "waves add up gradients where a compiled graph cannot see them",
        "Turn it off",
    ),
    Refusal(
        WAVES,
        "`attn_implementation='flex_attention'`",
        Situation.uses_flex_attention,
        "FlexAttention keeps the keys and values of the whole history for the backward pass of every layer",
        "Load the model with `'sdpa'` or a flash kernel",
    ),
    Refusal(
        WAVES,
        "`wave_tokens='auto'` with layers that run over whole paths",
        lambda run: run.args.wave_tokens == "auto" and next(run.layers_of_unknown_memory(), None),
        "it runs over whole paths, whose memory a wave does not bound",
        "Set a number of tokens",
    ),
    Refusal(
        WAVES,
        "`wave_tokens='auto'` with recurrent layers of which a rank holds a shard",
        lambda run: run.args.wave_tokens == "auto" and run.shards_the_model() and next(run.recurrent_layers(), None),
        "its activations are measured on a whole model, not on a shard",
        "Set a number of tokens",
    ),
    Refusal(
        PARTS,
        "`activation_offloading`",
        lambda run: run.args.activation_offloading,
        "it expects one forward before each backward",
        "Turn it off",
    ),
    Refusal(
        PARTS,
        "`optim='lomo'`, `'adalomo'` and layerwise optimizers",
        _updates_during_backward,
        "it updates parameters during backward, between the parts of a row",
        "Choose another",
    ),
    Refusal(
        PARTS,
        "`neftune_noise_alpha`",
        lambda run: run.args.neftune_noise_alpha is not None,
        _NOISE,
        "Leave it unset",
    ),
    Refusal(
        PARTS,
        "`Dropout` layers",
        lambda run: next(run.dropout_layers(), None),
        "tokens that run twice would drop different units each time",
        "Set it to 0",
    ),
    Refusal(
        PARTS,
        "adapters that draw random numbers",
        lambda run: next(run.random_adapters(), None),
        _NOISE,
        "Use an adapter that draws none",
    ),
    Refusal(
        PARTS,
        "`router_jitter_noise` of a model",
        lambda run: bool(run.of_text_config("router_jitter_noise")) and "router_jitter_noise",
        _NOISE,
        "Set it to 0",
    ),
    Refusal(
        PARTS,
        "engines other than DDP, DeepSpeed and FSDP2",
        Situation.unknown_engine,
        "how it accumulates gradients is not known",
        "Train with DDP, DeepSpeed or FSDP2",
    ),
    Refusal(
        PARTS,
        "`fsdp_version=1`",
        Situation.uses_fsdp1,
        "it flattens parameters between backward passes",
        "Set `fsdp_version=2`",
    ),
    Refusal(
        PARTS,
        f"`{PREFETCHED}` above 0 of ZeRO-3",
        Situation.prefetches,
        "it fetches parameters in the order of the first step, and the number of parts changes from row to row",
        "Set it to 0 or `'auto'`",
    ),
)
