"""Compare both runs, by counting and by measurement: the demo's table and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from trl_singlepass import PrefixTree, Sample
from trl_singlepass.cost import ModelShape, npass_cost, single_pass_cost
from trl_singlepass.reference.report import VerifyReport
from trl_singlepass.reports.tree_plots import plot_mask, plot_tree


NPASS_STYLE = {"color": "#9fb3c8", "linewidth": 5, "label": "N-pass"}
SINGLE_PASS_STYLE = {"color": "#c2410c", "linewidth": 1.4, "label": "single pass"}


@dataclass(frozen=True)
class Comparison:
    """
    Both runs side by side.

    `npass` and `single_pass` are the results of `demo.train`, `rows` the samples of every trained conversation, and
    `report` is the result of `verify` on the first of them.
    """

    npass: dict[str, Any]
    single_pass: dict[str, Any]
    rows: list[list[Sample]]
    shape: ModelShape
    report: VerifyReport

    @property
    def runs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.npass, self.single_pass

    @property
    def seconds(self) -> list[float]:
        """Total time of each run, without the first step, in which memory is still being allocated."""
        return [sum(run["seconds"][1:]) for run in self.runs]

    @property
    def largest_loss_difference(self) -> float:
        return max(abs(a - b) for a, b in zip(*(run["losses"] for run in self.runs), strict=True))

    def table(self) -> Table:
        samples = [sample for turns in self.rows for sample in turns]
        table = Table(title=f"{len(self.rows)} conversations, {len(samples)} turns")
        table.add_column("")
        for name in ("N-pass", "single pass"):
            table.add_column(name, justify="right")
        table.add_column("")
        table.add_column("", justify="right")
        for section in (self._speed(samples), self._exactness()):
            for row in section:
                table.add_row(*row)
            table.add_section()
        table.caption = (
            f"N-pass: TRL's SFTTrainer on one sample per turn, {self.npass['batching']}. "
            f"Time: {self.npass['clock']}, all steps but the first."
        )
        return table

    def _speed(self, samples: list[Sample]) -> list[tuple[str, ...]]:
        npass = npass_cost(samples, self.shape)
        single = single_pass_cost([PrefixTree.from_samples(turns) for turns in self.rows], self.shape)
        work = [cost.flops / 1e12 for cost in (npass, single)]
        seconds, memory = self.seconds, [run["memory"] / 2**20 for run in self.runs]
        return [
            (
                "tokens",
                f"{npass.tokens:,}",
                f"{single.tokens:,}",
                "sharing factor",
                f"{npass.tokens / single.tokens:.2f}",
            ),
            (
                "counted work, TFLOP",
                *(f"{tera:.2f}" for tera in work),
                "predicted speed-up",
                f"{work[0] / work[1]:.2f}",
            ),
            ("time, s", *(f"{s:.1f}" for s in seconds), "measured speed-up", f"{seconds[0] / seconds[1]:.2f}"),
            ("peak memory, MiB", *(f"{mib:.0f}" for mib in memory), "ratio", f"{memory[1] / memory[0]:.2f}"),
        ]

    def _exactness(self) -> list[tuple[str, ...]]:
        report, steps = self.report, len(self.npass["losses"])
        verdict = "equal: difference" if report.ok else "NOT EQUAL: difference"
        losses = report.npass_loss, report.single_pass_loss
        gradients = max(row.gradient_error for row in report.rows)
        first, last = ([f"{run['losses'][step]:.7f}" for run in self.runs] for step in (0, -1))
        return [
            ("loss, step 1", *first, "", ""),
            (f"loss, step {steps}", *last, "largest difference", f"{self.largest_loss_difference:.0e}"),
            (
                f"verify, {report.dtype}: loss",
                *(f"{x:.7f}" for x in losses),
                verdict,
                f"{abs(losses[0] - losses[1]):.0e}",
            ),
            ("verify: gradients", "", "", verdict, f"{gradients:.0e}"),
        ]

    def draw_losses(self, path: Path) -> None:
        """Plot the loss of both trainers by step, where the curves must coincide, and by time, where they must not."""
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        for run, style in zip(self.runs, (NPASS_STYLE, SINGLE_PASS_STYLE), strict=True):
            by_step.plot(range(1, len(run["losses"]) + 1), run["losses"], **style)
            by_time.plot(list(accumulate(run["seconds"])), run["losses"], **style)
        _finish(by_step, "step", f"same losses: largest difference {self.largest_loss_difference:.0e}")
        _finish(by_time, "seconds of training", "less time")
        by_step.set_ylabel("training loss")
        figure.savefig(path, dpi=150)


def _finish(axes: Axes, x: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def draw_conversation(rows: list[list[Sample]], tokenizer: Any, folder: Path) -> list[Path]:
    """Draw tree and mask of the conversation whose number of turns suits a picture best."""
    turns = min(rows, key=lambda turns: (abs(len(turns) - 7), sum(map(len, turns))))
    tree, paths = PrefixTree.from_samples(turns), [folder / "tree.png", folder / "mask.png"]
    for path, plot in zip(paths, (plot_tree, plot_mask), strict=True):
        plot(tree, tokenizer).savefig(path, dpi=150)
    return paths
