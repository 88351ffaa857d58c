"""
Try releases of other libraries, each in a fresh environment: which of them pass the tests.

    python -m versions.environments oldest newest         both ends of the ranges in pyproject.toml
    python -m versions.environments "trl==1.12.0 transformers==5.23.0"
    python -m versions.environments main                  TRL's main branch

The result goes to versions/results/passed.json and, from there, to README.md and docs/limits.md. An environment takes
about 1.5 GB and ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.version import Version

from .report import RESULTS, read_results, write_pages


ROOT = Path(__file__).parents[1]
TRL_MAIN = "trl @ https://github.com/huggingface/trl/archive/main.tar.gz"
TRIED = ("trl", "transformers", "accelerate", "deepspeed", "datasets", "peft")
TOOLS = ("pytest", "pytest-xdist", "hypothesis")
# With TRL before 1.16, which lacks what pairs, groups and waves need: attention next to N-pass, rendering, the trainer
# next to TRL's. Comparisons with `apply_chat_template` are left out: older releases do not pass on reasoning under the
# name that a template reads.
PART = (
    "tests/attention/test_exactness.py",
    "tests/rendering/test_samples.py",
    "tests/training/test_equivalence.py",
    "tests/training/test_overrides.py",
    "-k=not equal_apply",
)
# With newer ones, all tests but those of the repository itself: its pages, benchmarks and style.
TESTS = sorted({str(path.parent.relative_to(ROOT)) for path in ROOT.glob("tests/*/test_*.py")} - {"tests/project"})


def oldest() -> list[str]:
    """Return the lowest release of each library that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = map(Requirement, [*project["dependencies"], *extras["deepspeed"], *extras["peft"]])
    ranges = {requirement.name: requirement.specifier for requirement in requirements}
    return [f"{name}=={end.version}" for name in TRIED for end in ranges[name] if end.operator == ">="]


def pins_of(name: str) -> list[str]:
    """Return what is installed beside the package: for a name, or as listed."""
    return {"oldest": oldest(), "newest": [], "main": [TRL_MAIN]}.get(name, name.split())


def make(folder: Path, pins: list[str]) -> Path:
    """Make an environment with the package, what the tests need and these requirements; return its Python."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    package = f"{ROOT}[deepspeed,images,peft,plot]"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--editable", package, *TOOLS, *pins], check=True)
    return python


def run_tests(python: Path, folder: Path, tests: Sequence[str]) -> dict[str, Any]:
    """Run tests; return how many passed and were skipped, and the names of those that failed."""
    report = folder / "report.xml"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    # What a release calls deprecated says nothing about whether it works.
    ignored = [part for name in ("DeprecationWarning", "FutureWarning") for part in ("-W", f"ignore::{name}")]
    on_two_cores = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    command = [python, "-m", "pytest", *tests, *on_two_cores, "--quiet", f"--junitxml={report}", *ignored]
    subprocess.run(command, cwd=ROOT, env=environment, check=False)
    return outcome_of(report)


def outcome_of(report: Path) -> dict[str, Any]:
    """Read a report in JUnit's format."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = [f"{case.get('classname', '')}::{case.get('name')}" for case in failed]
    return {"passed": len(cases) - len(failed) - len(skipped), "skipped": len(skipped), "failed": names}


def try_out(name: str, folder: Path) -> dict[str, Any]:
    """Make an environment, run the tests in it, and return the result with the versions that were installed."""
    python = make(folder, pins_of(name))
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True)
    installed = {package["name"]: package["version"] for package in json.loads(listed.stdout)}
    is_older = Version(installed["trl"]) < Version("1.16")
    if is_older:  # transformers 5.12 imports a name that the newest torchvision no longer has
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"python": platform.python_version()} | {name: installed[name] for name in (*TRIED, "torch")},
        **run_tests(python, folder, PART if is_older else TESTS),
    }


def main() -> int:
    """Try each environment; return 1 if a test failed in one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="+", help="oldest, newest, main, or requirements in quotes")
    failed = False
    for name in parser.parse_args().environments:
        with tempfile.TemporaryDirectory() as folder:
            result = try_out(name, Path(folder))
        print(name, json.dumps(result, indent=1))
        failed |= bool(result["failed"]) or not result["passed"]
        others = [one for one in read_results() if one["versions"] != result["versions"]]
        RESULTS.write_text(json.dumps([*others, result], indent=1) + "\n", encoding="utf-8")
    write_pages()
    return failed


if __name__ == "__main__":
    sys.exit(main())
