"""The pictures of the README."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.exactness.arms import ARMS
from studies.exactness.summary import Interval, Record, later_turns, loss_differences, runs_by_seed


STYLES = {
    "single_pass": {"color": "#c2410c", "marker": "o"},
    "npass": {"color": "#f4a97f", "marker": "D", "linestyle": ":"},
    "keep_reasoning": {"color": "#2563a8", "marker": "s"},
    "assistant_only_loss": {"color": "#6fb1e0", "marker": "^", "linestyle": "--"},
    "last_turn": {"color": "#5b6b4a", "marker": "v"},
}
SETTINGS = {"tokens": "equal optimizer tokens", "flops": "equal counted operations"}
PRECISIONS = {"control": "float64", "tokens": "float32"}
CONTEXTS = {"given": "right answers,\nreasoning stripped", "own": "own answers,\nreasoning stripped",
            "kept": "right answers,\nreasoning kept"}  # fmt: skip


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw every picture and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "study_turns.png": accuracy_by_turn,
        "study_histories.png": accuracy_by_history,
        "study_control.png": control,
    }
    for name, picture in pictures.items():
        picture(records).savefig(folder / name, dpi=150)
    return [folder / name for name in pictures]


def compared(records: Sequence[Record]) -> dict[str, str]:
    """Return the settings that have results beyond the single pass, with their titles."""
    others = [arm for arm in ARMS if arm != "single_pass"]
    return {key: title for key, title in SETTINGS.items() if any(runs_by_seed(records, key, arm) for arm in others)}


def accuracy_by_turn(records: Sequence[Record]) -> Figure:
    """Plot accuracy by turn under the stock template, one panel per setting."""
    shown = compared(records)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (setting, title) in zip(panels, shown.items(), strict=True):
        for shift, (name, style) in enumerate(STYLES.items()):
            runs = runs_by_seed(records, setting, name).values()
            if runs:
                by_turn = zip(*(run["accuracy"]["given"] for run in runs), strict=True)
                _curve(axes, [Interval(turn) for turn in by_turn], 0.1 * (shift - 2), ARMS[name].title, style)
        _finish(axes, "turn", title)
        axes.set_ylim(0, 1.02)
    panels[0].set_ylabel("accuracy")
    _legend(figure, panels[0])
    return figure


def _curve(axes: Axes, intervals: Sequence[Interval], shift: float, label: str, style: dict[str, str]) -> None:
    turns = [turn + shift for turn in range(1, len(intervals) + 1)]
    errors = [interval.half or 0 for interval in intervals]
    axes.errorbar(
        turns, [interval.mean for interval in intervals], errors, label=label, markersize=4, capsize=2,
        elinewidth=0.8, linewidth=1.4, **style,
    )  # fmt: skip


def accuracy_by_history(records: Sequence[Record]) -> Figure:
    """Plot accuracy over later turns for every kind of history, with equal tokens."""
    figure = Figure(figsize=(8.5, 4.4), layout="constrained")
    axes, width = figure.subplots(), 0.16
    for number, (name, style) in enumerate(STYLES.items()):
        runs = runs_by_seed(records, "tokens", name).values()
        if runs:
            intervals = [Interval([later_turns(run, history) for run in runs]) for history in CONTEXTS]
            places = [place + width * (number - 2) for place in range(len(CONTEXTS))]
            errors = [interval.half or 0 for interval in intervals]
            axes.bar(
                places, [interval.mean for interval in intervals], width, yerr=errors, color=style["color"],
                label=ARMS[name].title, error_kw={"elinewidth": 0.8, "capsize": 2},
            )  # fmt: skip
    axes.set_xticks(range(len(CONTEXTS)), list(CONTEXTS.values()))
    axes.set_ylabel("accuracy, turns 2–8")
    _finish(axes, "history in the prompt", "equal optimizer tokens")
    axes.set_ylim(0, 1.02)
    _legend(figure, axes)
    return figure


def control(records: Sequence[Record]) -> Figure:
    """Plot the relative difference between the losses of N-pass and the single pass, step by step."""
    pairs = {setting: loss_differences(records, setting, ("npass", "single_pass")) for setting in PRECISIONS}
    pairs = {setting: by_seed for setting, by_seed in pairs.items() if by_seed}
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
    for axes, (setting, by_seed) in zip(panels, pairs.items(), strict=True):
        for seed, steps in by_seed.items():
            # A logarithmic axis cannot show a difference of zero.
            points = {step: difference for step, difference in enumerate(steps, 1) if difference}
            axes.semilogy(list(points), list(points.values()), ".", label=f"seed {seed}", markersize=3)
        _finish(axes, "optimizer step", f"N-pass against single pass, {PRECISIONS[setting]}")
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", markerscale=3)
    panels[0].set_ylabel("relative difference of the loss")
    return figure


def _finish(axes: Axes, x: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
