"""Times N-pass and the single pass on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from rich.table import Table

from ..cost.flops import Cost, get_model_shape, npass_cost, single_pass_cost
from ..engine.enable import enable_tree
from ..trees.prefix_tree import PrefixTree
from ..trees.sample import Sample
from .npass import LossAndGradients, npass_loss_and_gradients
from .single_pass import single_pass_loss_and_gradients


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Timing:
    """Measured time and counted work of N-pass and the single pass on the same conversations."""

    # forward and backward of all samples, one by one: the sum over conversations of each one's median
    npass_seconds: float
    single_pass_seconds: float  # the same for the trees
    npass_cost: Cost  # counted work of all samples
    single_pass_cost: Cost  # counted work of all trees

    @property
    def speedup(self) -> float:
        """Measured seconds of N-pass ÷ those of the single pass."""
        return self.npass_seconds / self.single_pass_seconds

    @property
    def forecast(self) -> float:
        """Counted operations of N-pass ÷ those of the single pass."""
        return self.npass_cost.flops / self.single_pass_cost.flops

    def table(self) -> Table:
        """Return the timing as a table for `rich` to print."""
        table = Table(title="Forward and backward on this machine", title_justify="left", title_style="bold")
        for name in ("", "N-pass", "single pass", "N-pass ÷ single pass"):
            table.add_column(name, justify="right" if name else "left")
        npass, single = self.npass_cost, self.single_pass_cost
        table.add_row("tokens", f"{npass.tokens:,}", f"{single.tokens:,}", f"{npass.tokens / single.tokens:.2f}")
        table.add_row(
            "TFLOP, counted", *(f"{cost.flops / 1e12:.3g}" for cost in (npass, single)), f"{self.forecast:.2f}"
        )
        seconds = (self.npass_seconds, self.single_pass_seconds)
        table.add_row("seconds, measured", *(f"{value:.3g}" for value in seconds), f"{self.speedup:.2f}", style="bold")
        return table


def time_both(
    model: PreTrainedModel,
    conversations: Sequence[Sequence[Sample]],
    *,
    repeats: int = 3,
    on_step: Callable[[], object] = lambda: None,
) -> Timing:
    """
    Time N-pass and the single pass on the same conversations. Afterwards, the model is on tree attention.

    Takes a model on stock attention. Each conversation is timed `repeats` times, after one warm-up run; `on_step` is
    called after each run, `2 × conversations × (repeats + 1)` times in all, for a progress bar.
    """
    shape = get_model_shape(model.config)
    npass = _seconds(npass_loss_and_gradients, model, conversations, repeats, on_step)
    enable_tree(model)
    single_pass = _seconds(single_pass_loss_and_gradients, model, conversations, repeats, on_step)
    return Timing(
        npass,
        single_pass,
        npass_cost([sample for samples in conversations for sample in samples], shape),
        single_pass_cost([PrefixTree.from_samples(samples) for samples in conversations], shape),
    )


def _seconds(
    run: Callable[[PreTrainedModel, Sequence[Sample]], LossAndGradients],
    model: PreTrainedModel,
    conversations: Sequence[Sequence[Sample]],
    repeats: int,
    on_step: Callable[[], object],
) -> float:
    total = 0.0
    for samples in conversations:
        runs = []
        for _ in range(repeats + 1):
            runs.append(run(model, samples).seconds)
            on_step()
        total += median(runs[1:])
    return total
