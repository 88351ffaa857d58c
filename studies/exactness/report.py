"""
Write tables and pictures into README.md of this folder, from the files under results/ alone.

    python -m studies.exactness.report
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from studies.exactness.arms import ARMS
from studies.exactness.pictures import compared, draw
from studies.exactness.runs import RESULTS, SEEDS, SETTINGS, list_runs
from studies.exactness.summary import Interval, Record, differences, later_turns, load, loss_differences, runs_by_seed


FOLDER = Path(__file__).parent
BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
HISTORIES = {"given": "right answers", "own": "own answers", "kept": "right answers, reasoning kept"}
HEADER = ["arm", "seeds", "steps", "conversations", "trained tokens", "GFLOP", "turn 1", "turns 2–8", "against exact"]


def setting_table(records: Sequence[Record], setting: str) -> list[list[str]]:
    """Return one row per arm: what it was trained on, and how well it answers."""
    exact, rows = runs_by_seed(records, setting, "single_pass"), []
    for name, arm in ARMS.items():
        runs = runs_by_seed(records, setting, name)
        if not runs:
            continue
        sizes = [mean(run[key] for run in runs.values()) for key in ("steps", "conversations", "trained_tokens")]
        gap = differences(runs, exact, later_turns) if name != "single_pass" else []
        rows.append(
            [
                arm.title,
                str(len(runs)),
                *(f"{size:,.0f}" for size in sizes),
                f"{mean(run['flops'] for run in runs.values()) / 1e9:,.0f}",
                Interval([run["accuracy"]["given"][0] for run in runs.values()]).text(),
                Interval([later_turns(run) for run in runs.values()]).text(),
                Interval(gap).text("+") if gap else "",
            ]
        )
    return rows


def history_table(records: Sequence[Record], setting: str) -> list[list[str]]:
    """Return one row per arm: accuracy over later turns for each kind of history."""
    rows = []
    for name, arm in ARMS.items():
        runs = runs_by_seed(records, setting, name).values()
        if runs:
            accuracies = [Interval([later_turns(run, history) for run in runs]).text() for history in HISTORIES]
            rows.append([arm.title, *accuracies])
    return rows


def agreement(records: Sequence[Record], setting: str, arms: tuple[str, str]) -> str:
    """Return a sentence on how closely two arms agree."""
    by_seed = loss_differences(records, setting, arms)
    if not by_seed:
        return ""
    largest = max(max(steps) for steps in by_seed.values())
    close = min(next((i for i, x in enumerate(steps) if x > 1e-6), len(steps)) for steps in by_seed.values())
    total = min(map(len, by_seed.values()))
    seeds = f"{len(by_seed)} seed{'s' * (len(by_seed) > 1)}"
    return (
        f"{ARMS[arms[0]].title} and {ARMS[arms[1]].title}, {seeds}, {total} steps: losses differ by "
        f"{largest:.0e} relative at most; within 1e-6 for the first {close} steps of every seed."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_line(records: Sequence[Record]) -> str:
    """Return the machines, versions and commits of the results."""
    machines = sorted({f"{record['machine']['processor']}, {record['machine']['device']}" for record in records})
    versions = sorted({", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in records})
    commits = sorted({record["commit"][:7] for record in records})
    dates = sorted({record["date"] for record in records})
    minutes = sum(record["cpu_seconds"] for record in records) / 60
    return (
        f"<sub>`studies/exactness/results/`, {len(records)} runs, {', '.join(dates)}, commit {', '.join(commits)}: "
        f"{'; '.join(machines)}; {'; '.join(versions)}; {minutes:.0f} minutes of CPU time for training.</sub>"
    )


def missing_line(folder: Path) -> str:
    """Return a line that names the runs that are missing."""
    runs = list(list_runs("qwen3", SETTINGS, ARMS, SEEDS))
    missing = [run for run in runs if not run.path(folder).exists()]
    if not missing:
        return ""
    names = sorted({f"{run.setting} {run.arm}" for run in missing})
    return f"Not run yet, {len(missing)} of {len(runs)} runs: {', '.join(names)}."


def section(records: Sequence[Record], folder: Path) -> str:
    """Return the generated part of the page; `folder` holds the results."""
    parts = []
    for setting, title in compared(records).items():
        parts += [f"### {title.capitalize()}", table(HEADER, setting_table(records, setting))]
    header = ["arm", *(f"history: {text}" for text in HISTORIES.values())]
    parts += ["### Other histories", table(header, history_table(records, "tokens"))]
    pairs = [
        ("float64", "control", ("npass", "single_pass")),
        ("float32", "tokens", ("npass", "single_pass")),
        ("float32", "tokens", ("assistant_only_loss", "keep_reasoning")),
    ]
    found = [(precision, agreement(records, setting, arms)) for precision, setting, arms in pairs]
    parts += ["### Controls", "\n".join(f"- {precision}: {text}" for precision, text in found if text)]
    return "\n\n".join(part for part in (*parts, machine_line(records), missing_line(folder)) if part)


def write(results: Path = RESULTS, folder: Path = FOLDER) -> None:
    """Rewrite the generated part of the page and the pictures."""
    records, page = load(results / "qwen3"), folder / "README.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{section(records, results)}\n\n{END}{rest.split(END)[1]}")
    draw(records, folder / "images")


if __name__ == "__main__":
    write()
