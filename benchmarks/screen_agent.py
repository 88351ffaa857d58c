"""
A step on an agent that looks at screens: images encoded, tokens, time and memory of N-pass and of a single pass.

    python -m benchmarks.screen_agent

It writes `benchmarks/results/screen_agent.json` and the table of `docs/images.md`.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from examples import screen_agent


ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "screen_agent.json", ROOT / "docs" / "images.md"
TURNS = 20
CASES = {"all screens": None, "the last three screens": 3}
START, END = "<!-- table of benchmarks/screen_agent.py -->\n", "<!-- end of the table -->\n"


def measure(window: int | None) -> dict[str, Any]:
    arguments = ["--episodes", "1", "--turns", str(TURNS)]
    arguments += [] if window is None else ["--window", str(window)]
    npass, single_pass, difference = screen_agent.compare(arguments)
    passes = {"npass": npass, "single_pass": single_pass}
    figures = {name: {key: x for key, x in asdict(one).items() if key != "gradients"} for name, one in passes.items()}
    return {**figures, "largest_gradient_difference": difference}


def table_of(results: dict[str, Any]) -> str:
    """Return the rows of the table in the docs."""
    lines = [
        "| history keeps | | images encoded | tokens | seconds of CPU | peak memory |\n",
        "|---|---|---:|---:|---:|---:|\n",
    ]
    for case, figures in results["cases"].items():
        for name, label in (("npass", "N-pass"), ("single_pass", "single pass")):
            one = figures[name]
            lines.append(
                f"| {case} | {label} | {one['encodings']:,} | {one['tokens']:,} | {one['seconds']:.1f} | "
                f"{one['peak_bytes'] / 1e6:.0f} MB |\n"
            )
    return "".join(lines)


def write_table(results: dict[str, Any]) -> None:
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + START + table_of(results) + END + rest.partition(END)[2])


def main() -> None:
    argparse.ArgumentParser(prog="benchmarks.screen_agent", description=__doc__.splitlines()[1]).parse_args()
    results = {
        **describe("cpu", "screen_agent"),
        "turns": TURNS,
        "cases": {case: measure(window) for case, window in CASES.items()},
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    write_table(results)


if __name__ == "__main__":
    main()
