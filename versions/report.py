"""
Write the releases of other libraries that passed the tests into README.md and docs/limits.md.

    python -m versions.report
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from packaging.version import Version


ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "passed.json"
BEGIN, END = "<!-- versions: begin -->", "<!-- versions: end -->"
NAMES = {
    "trl": "TRL",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "deepspeed": "DeepSpeed",
    "datasets": "datasets",
    "peft": "PEFT",
    "torch": "PyTorch",
    "python": "Python",
}
IN_README = ("trl", "transformers", "accelerate", "deepspeed", "torch")


def read_results() -> list[dict[str, Any]]:
    """Return the recorded results, the oldest TRL first."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    return sorted(results, key=lambda one: [Version(one["versions"][name]) for name in NAMES])


def summary(results: list[dict[str, Any]]) -> str:
    """Return the releases that passed, as one paragraph."""
    passed = [one["versions"] for one in results if one["passed"] and not one["failed"]]
    lists = (
        f"{NAMES[name]} {', '.join(sorted({one[name].partition('+')[0] for one in passed}, key=Version))}"
        for name in IN_README
    )
    return f"Tested together ([table](docs/limits.md#known-to-work)):\n{'; '.join(lists)}."


def table(results: list[dict[str, Any]]) -> str:
    """Return one line for each environment, with what failed in it."""
    rows = [[*NAMES.values(), "passed", "skipped", "failed"], ["---"] * (len(NAMES) + 3)]
    for one in results:
        counts = (str(one["passed"]), str(one["skipped"]), str(len(one["failed"])))
        rows.append([*(one["versions"][name] for name in NAMES), *counts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


PAGES = {ROOT / "README.md": summary, ROOT / "docs" / "limits.md": table}


def with_results(page: str, text: str) -> str:
    """Return a page with a text between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def write_pages() -> None:
    """Write all pages."""
    results = read_results()
    for path, written in PAGES.items():
        path.write_text(with_results(path.read_text(encoding="utf-8"), written(results)), encoding="utf-8")


if __name__ == "__main__":
    write_pages()
