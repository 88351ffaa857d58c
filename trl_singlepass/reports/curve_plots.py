"""Plots of loss by turn, of sharing and of speed-up. They need matplotlib (the extra `plot`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .tree_plots import CONTEXT, INK, TRAINED


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .audit import AuditReport

_BOUND = "#c2410c"
_PARTS = {"reasoning_loss": ("reasoning", TRAINED), "answer_loss": ("answer", "#5b7fa6"), "loss": ("all", INK)}
_TURN = re.compile(r"(?:eval_)?turn[/_](\d+)/(\w+)")  # with `_` in logs of earlier versions


def plot_loss_by_turn(metrics: Mapping[str, float]) -> Figure:
    """
    Plot the loss by turn of the conversation: of reasoning, of answers and of both.

    `metrics` is an entry of `trainer.state.log_history`, or the result of `evaluate()`, with `log_turn_metrics=True`;
    without metrics by turn, it raises `ValueError`.
    """
    found = [(match, value) for name, value in metrics.items() if (match := _TURN.fullmatch(name))]
    by_part = {part: sorted((int(m[1]), value) for m, value in found if m[2] == part) for part in _PARTS}
    if not by_part["loss"]:
        raise ValueError(
            f"Expected metrics by turn, got {sorted(metrics)}. Train or evaluate with log_turn_metrics=True."
        )
    figure, axes = _axes("turn", "loss per token")
    for part, (label, colour) in _PARTS.items():
        if by_part[part]:
            turns, losses = zip(*by_part[part], strict=True)
            width = 2.2 if part == "loss" else 1.4
            axes.plot(turns, losses, color=colour, linewidth=width, marker="o", markersize=4, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xticks([turn for turn, _ in by_part["loss"]])
    axes.set_title("Loss by turn", fontsize=11)
    axes.legend(frameon=False)
    return figure


def plot_sharing(report: AuditReport) -> Figure:
    """Plot the sharing factor by number of turns; `ValueError` if no conversation can be trained."""
    from matplotlib.ticker import MaxNLocator

    entries = report.sharing_by_turns
    if not entries:
        raise ValueError("Nothing to plot: no conversation of this dataset can be trained.")
    turns, sharing = [entry.num_turns for entry in entries], [entry.sharing_factor for entry in entries]
    figure, axes = _axes("turns of a conversation", "sharing factor")
    axes.plot(turns, sharing, color=CONTEXT, linewidth=1.4, zorder=1)
    area = [12 + 8 * entry.conversations for entry in entries]
    axes.scatter(turns, sharing, s=area, color=TRAINED, edgecolor=INK, linewidth=0.6, zorder=2)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, steps=[1, 2, 5, 10]))
    axes.set_title("Tokens of N separate samples ÷ tokens of the tree (area: number of conversations)", fontsize=11)
    return figure


def plot_speedup(turns: Sequence[int], measured: Sequence[float], bound: Sequence[float]) -> Figure:
    """
    Plot the measured speed-up over N-pass by number of turns, with the bound that the counted work sets.

    Both are N-pass ÷ single pass for each number of turns: `measured` of times, `bound` of counted work.
    """
    figure, axes = _axes("turns of a conversation", "speed-up over N-pass")
    axes.fill_between(turns, 1, bound, color=CONTEXT, alpha=0.35, linewidth=0)
    axes.plot(turns, bound, color=_BOUND, linewidth=1.4, linestyle="--", label="bound: counted work")
    axes.plot(turns, measured, color=INK, linewidth=2.2, marker="o", markersize=5, label="measured")
    for turn, value in zip(turns, measured, strict=True):
        axes.annotate(
            f"{value:.2f}", (turn, value), (0, -15), textcoords="offset points", ha="center", fontsize=8.5, color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(turns, [str(turn) for turn in turns])
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.12)
    axes.legend(frameon=False, loc="upper left")
    return figure


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
