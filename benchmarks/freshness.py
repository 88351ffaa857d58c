"""
Which files under benchmarks/results/ are older than the code that they measure, and how to measure them again.

    python -m benchmarks.freshness                                list them, with the command for each
    python -m benchmarks.freshness --run --data FOLDER            run these commands, one after another

A file carries a digest of each path of code that it measured (`benchmarks.machine.describe`). A digest, and no date or
commit: it is the same in a shallow clone, after a rebase and on any release of Python; a comment, a docstring and a
merge leave it as it is; and it says which path has changed.
"""

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from versions.sources import module_digest


ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
DATA = ("llamafactory_reason_tool_use.jsonl", "mathchat_follow_up_300.jsonl", "taubench_gpt4o_airline.jsonl")
"""Public conversations, of which benchmarks/shapes/ has the shapes."""


@dataclass(frozen=True)
class Figures:
    """The files of one kind: what follows `python -m` to write them, and the code that they measure."""

    command: str
    rooms: str
    """Paths inside `trl_singlepass/`. A folder stands for its files, without the folders in it."""
    others: str = ""
    """Paths from the root of the repository, besides the module of the command."""
    seconds: int = 0
    """About how long the command takes on one core."""
    exempt: str = ""
    """Why the files may be older than their code."""

    @property
    def module(self) -> str:
        return self.command.split()[0]

    @property
    def paths(self) -> list[str]:
        own = self.module.replace(".", "/") + ".py"
        return [own, *self.others.split(), *(f"trl_singlepass/{path}" for path in self.rooms.split())]


ROW = "trees attention engine data/collator.py"
WAVES = f"{ROW} engine/wave_plan.py engine/waves.py"
TRAINER = f"{WAVES} data training recurrent"
RENDERING = "trees rendering data"
STEPS = f"{WAVES} cost reference/timing.py"
CONVERSATIONS = "benchmarks/modes.py benchmarks/shapes.py benchmarks/shapes"
TRIED_BY_A_TEST = "A slow test measures the same on the code as it is, and fails where it no longer holds: "
# By kind, in the order in which they are measured: what pages show first comes first.
FIGURES = {
    "step_time": Figures("benchmarks.step_time", STEPS, CONVERSATIONS, 1500),
    "preparation": Figures(
        "benchmarks.preparation --rounds 2 --tokenizer {tokenizer}", f"{RENDERING} training/dataset.py", seconds=280
    ),
    "step_time_shapes": Figures("benchmarks.step_time --shapes", STEPS, CONVERSATIONS, 650),
    "row_memory": Figures("benchmarks.step_time --memory", STEPS, CONVERSATIONS, 80),
    "step_profile": Figures(
        "benchmarks.step_profile --turns 4", STEPS, f"benchmarks/step_time.py {CONVERSATIONS}", 100
    ),
    "host_time": Figures(
        "benchmarks.host_time",
        f"{STEPS} recurrent",
        "benchmarks/gpu_counts.py benchmarks/launches.py benchmarks/model_shapes.py",
        150,
    ),
    "gpu_counts": Figures(
        "benchmarks.gpu_counts",
        f"{STEPS} recurrent",
        "benchmarks/kernel_speed.py benchmarks/launches.py benchmarks/model_shapes.py",
        150,
    ),
    "hybrid_step": Figures("benchmarks.hybrid_step", f"{ROW} recurrent reference/timing.py", "", 75),
    "groups": Figures(
        "benchmarks.groups --repeats 1",
        f"{ROW} cost/flops.py groups/lines.py",
        "benchmarks/preference.py",
        300,
    ),
    "rollouts": Figures(
        "benchmarks.groups --rollouts", f"{ROW} groups/contexts.py groups/lines.py", "benchmarks/preference.py", 60
    ),
    "preference": Figures(
        "benchmarks.preference --repeats 2 --pairs 1 --tokenizer {tokenizer} --data {data}/" + DATA[1],
        f"{ROW} rendering data/arrow.py data/pairs.py data/selection.py data/settings.py cost preference/collator.py",
        seconds=140,
    ),
    "self_check": Figures(
        "benchmarks.self_check", f"{ROW} engine/check training/self_check.py", "benchmarks/model_shapes.py", 80
    ),
    "long_conversation": Figures(
        "benchmarks.long_conversation --tokens 131072 1048576 --by-turns 1000 --tokenizer {tokenizer}",
        f"{RENDERING} engine/wave_plan.py engine/waves.py attention reference/timing.py",
        "benchmarks/preparation.py",
        60,
    ),
    "long_conversation_steps": Figures(
        "benchmarks.long_conversation --steps --step-tokens 262144 --window-tokens 1048576 --tokenizer {tokenizer}",
        f"{WAVES} data cost reference/timing.py",
        "benchmarks/preparation.py",
        180,
    ),
    "plan_time": Figures("benchmarks.plan_time", "trees attention engine/enable.py", "", 40),
    "balance_at_scale": Figures(
        "benchmarks.balance_at_scale --tokenizer {tokenizer} --data " + " ".join(f"{{data}}/{name}" for name in DATA),
        f"{RENDERING} cost/flops.py",
        "",
        200,
    ),
    "packing": Figures(
        "benchmarks.packing", "trees data/packing.py data/arrow.py data/report.py data/rows.py", "", 120
    ),
    "engine_memory": Figures("benchmarks.engine_memory", TRAINER, "recipes/deepspeed", 250),
    "screen_agent": Figures(
        "benchmarks.screen_agent", f"{ROW} images training/compatibility.py", "examples/screen_agent.py", 40
    ),
    # Last: it draws the step times.
    "loss_by_turn": Figures("benchmarks.pictures --train", f"{TRAINER} rendering", "demo", 300),
    "gpu_step": Figures("benchmarks.gpu", STEPS, "benchmarks/gpu_step.py benchmarks/model_shapes.py", 1500),
    "gpu_doctor": Figures("benchmarks.gpu", "", exempt="It says whether a GPU and its software work, not how fast."),
    "gpu_tests": Figures("benchmarks.gpu", "", exempt="Outcomes of tests, which go on where they stopped."),
    "engines": Figures(
        "tests.distributed.test_matrix", "", exempt=f"{TRIED_BY_A_TEST}a quarter of the cells, each within 1e-12."
    ),
    "soak": Figures("benchmarks.soak", "", exempt=f"{TRIED_BY_A_TEST}600 steps in place of 2,000."),
}


def code_of(kind: str) -> dict[str, str]:
    """Return a digest of each path of code that results of a kind measure, as it is now."""
    return {path: _digest(ROOT / path) for path in FIGURES[kind].paths}


def _digest(path: Path) -> str:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        text = "\n".join(f"{file.name} {_digest(file)}" for file in files)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    if path.suffix == ".py":
        return module_digest(path.read_text(encoding="utf-8"))
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def kind_of(path: Path) -> str:
    """Return the kind of a results file: what it says, or what its name begins with."""
    kind: str | None = json.loads(path.read_text(encoding="utf-8")).get("kind")
    found = kind or next((kind for kind in FIGURES if path.stem.startswith(kind)), None)
    if found not in FIGURES:
        raise ValueError(
            f"{path.stem} has no entry in FIGURES of benchmarks/freshness.py: which code does it measure?"
        )
    return found


def changed(path: Path) -> list[str]:
    """Return the paths whose code is not the one that a results file measured."""
    figures = FIGURES[kind := kind_of(path)]
    if figures.exempt:
        return []
    measured: dict[str, str] = json.loads(path.read_text(encoding="utf-8")).get("code", {})
    if not measured:
        return ["everything"]
    now = code_of(kind)
    return [name for name in {**measured, **now} if measured.get(name) != now.get(name)]


def stale(results: Path = RESULTS) -> dict[str, list[str]]:
    """Return the kinds of results that are older than their code, in the order of `FIGURES`, with what has changed."""
    found: dict[str, list[str]] = {}
    for path in sorted(results.glob("*.json")):
        if names := changed(path):
            found[kind_of(path)] = names
    return {kind: found[kind] for kind in FIGURES if kind in found}


def measure(kind: str, arguments: dict[str, str]) -> str | None:
    """Run the command of a kind; return why it failed, if it did."""
    command = FIGURES[kind].command
    if missing := [name for name, value in arguments.items() if f"{{{name}}}" in command and not value]:
        return f"needs --{missing[0]}"
    start = time.monotonic()
    line = [sys.executable, "-m", *shlex.split(command.format(**arguments))]
    print("$", shlex.join(["python", *line[1:]]), flush=True)
    code = subprocess.run(line, cwd=ROOT, check=False).returncode
    print(f"{kind}: {time.monotonic() - start:.0f} s", flush=True)
    return f"exit code {code}" if code else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.freshness", description=__doc__.splitlines()[1])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="only these, stale or not")
    parser.add_argument("--run", action="store_true", help="measure them again, and write the pages")
    parser.add_argument("--tokenizer", default="Qwen/Qwen3-0.6B", help="path or Hub id of Qwen3's tokenizer")
    parser.add_argument("--data", default="", help=f"folder with {', '.join(map(str, DATA))}")
    options = parser.parse_args()
    found = stale()
    chosen = options.kinds or list(found)
    if not options.run:
        for kind in chosen:
            print(f"{kind}: {', '.join(found.get(kind, [])) or 'nothing'} changed since")
            print(f"    python -m {FIGURES[kind].command}    (about {FIGURES[kind].seconds} s)")
        raise SystemExit(1 if found else 0)
    arguments = {"tokenizer": shlex.quote(options.tokenizer), "data": shlex.quote(options.data)}
    failed = {kind: why for kind in chosen if (why := measure(kind, arguments)) is not None}
    subprocess.run([sys.executable, "-m", "benchmarks.report"], cwd=ROOT, check=True)
    raise SystemExit("\n".join(f"{kind} was not measured: {why}" for kind, why in failed.items()) or None)


if __name__ == "__main__":
    main()
