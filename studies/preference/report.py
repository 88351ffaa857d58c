"""
Write the table of the study into README.md of this folder, from the files under results/ alone.

    python -m studies.preference.report
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from studies.exactness.report import table
from studies.exactness.summary import Interval
from studies.preference.arms import ARMS
from studies.preference.runs import RESULTS


PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
HISTORIES = {"given": "behind right answers", "own": "behind its own answers"}


def rows_of(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return accuracies before DPO, and after it for each arm and learning rate, with the difference to the first."""
    before = {history: [mean(record["before"][history]) for record in records] for history in HISTORIES}
    rows = [["before DPO", "", *(text for values in before.values() for text in (Interval(values).text(), ""))]]
    for name, arm in ARMS.items():
        for learning_rate in records[0]["sizes"]["learning_rates"]:
            row = [arm.title, f"{learning_rate:g}"]
            for history in HISTORIES:
                ours, own = ([accuracy(r, a, learning_rate, history) for r in records] for a in ("single_pass", name))
                gap = [theirs - exact for theirs, exact in zip(own, ours, strict=True)]
                row += [Interval(own).text(), "" if name == "single_pass" else Interval(gap).text("+")]
            rows.append(row)
    return rows


def accuracy(record: dict[str, Any], arm: str, learning_rate: float, history: str) -> float:
    """Return the mean accuracy over turns."""
    (run,) = (run for run in record["runs"] if (run["arm"], run["learning_rate"]) == (arm, learning_rate))
    return mean(run["accuracy"][history])


def section(records: Sequence[dict[str, Any]]) -> str:
    """Return the generated part of the page."""
    if not records:
        return "Not run yet: `python -m studies.preference` takes about ten minutes of CPU time."
    header = ["trained with", "learning rate"]
    for text in HISTORIES.values():
        header += [f"answers {text}", "against served contexts"]
    pairs, turns = (mean(record[key] for record in records) for key in ("pairs", "turns_per_trajectory"))
    machine = records[0]["machine"]["processor"]
    return (
        f"{table(header, rows_of(records))}\n\n"
        f"<sub>`studies/preference/results/`: {len(records)} seeds, {pairs:.0f} pairs of {turns:.1f} turns, "
        f"{sum(record['cpu_seconds'] for record in records) / 60:.0f} minutes of CPU time on {machine}.</sub>"
    )


def load(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*.json"))]


def write(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Rewrite the generated part of the page."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{section(load(results))}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    write()
