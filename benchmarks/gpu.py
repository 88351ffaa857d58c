"""
Everything that needs a GPU, in one go: doctor, the tests marked `gpu`, and the benchmark of whole steps.

    make gpu                                   within 25 minutes on one H100; the same line goes on where it stopped
    python -m benchmarks.gpu --minutes 60

Doctor and each step of the benchmark have a process of their own. The tests run file by file; then each that did not
pass runs alone, so that an error which breaks the CUDA context counts against the test that made it. Results are
written to benchmarks/results/, and what is there already is not run again.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.apart import run_apart
from benchmarks.machine import file_name_of_device


RESULTS = Path(__file__).parent / "results"
SHARE_OF_DOCTOR, SHARE_OF_TESTS = 0.1, 0.5  # of the time, at most
SECONDS_PER_TEST = 120.0
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", re.M)
NOT_RUN = "not run"
NO_GPU = "make gpu needs a CUDA GPU, and PyTorch sees none here: run it on a machine with one."


def run_doctor(path: Path, seconds: float) -> bool:
    """Write doctor's report, unless it is there; return whether nothing is wrong."""
    if not path.exists():
        outcome = run_apart([sys.executable, "-m", "trl_singlepass.cli", "doctor", "--json", str(path)], seconds)
        print(outcome.output)
        if not path.exists():
            print(f"doctor: {outcome.failed}")
            return False
    return bool(json.loads(path.read_text())["ok"])


def run_tests(path: Path, seconds: float, selection: Sequence[str] = ("-m", "gpu")) -> dict[str, str]:
    """Run the tests that have not passed yet; return and write an outcome, or a reason, for each."""
    deadline = time.monotonic() + seconds
    found: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    if not found:
        found = dict.fromkeys(collect_tests(selection), NOT_RUN)
    # Skips may be missing packages, which are installed between two runs.
    alone = [test for test, outcome in found.items() if outcome not in ("PASSED", NOT_RUN)]
    new = [test for test, outcome in found.items() if outcome == NOT_RUN]
    files: dict[str, list[str]] = {}
    for test in new:
        files.setdefault(test.partition("::")[0], []).append(test)
    for tests in sorted(files.values(), key=len):  # those of a large file keep no others from running
        if (left := deadline - time.monotonic()) <= 0:
            return found
        found |= outcomes(tests, left)
        if time.monotonic() >= deadline:  # cut off; all but the test that ran at that time wait for the next run
            cut_off = [test for test in tests if found[test].startswith("did not end")]
            found |= dict.fromkeys(cut_off[1:], NOT_RUN)
        path.write_text(json.dumps(found, indent=1) + "\n")
        alone += [test for test in tests if found[test] not in ("PASSED", "SKIPPED", NOT_RUN)]
    for test in alone:
        if (left := deadline - time.monotonic()) <= 0:
            break
        found |= outcomes([test], min(left, SECONDS_PER_TEST))
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{test}: {found[test]}", flush=True)
    return found


def collect_tests(selection: Sequence[str]) -> list[str]:
    collecting = [sys.executable, "-m", "pytest", "--collect-only", "--verbosity=-1", "-n", "0"]
    outcome = run_apart([*collecting, *selection], 300)
    tests = [line for line in outcome.output.splitlines() if "::" in line]
    if not tests:
        raise RuntimeError(f"pytest found no test with {' '.join(selection)}: {outcome.failed}\n{outcome.output}")
    return tests


def outcomes(tests: Sequence[str], seconds: float) -> dict[str, str]:
    """Outcome of each test that came to an end, and for the others why they did not."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "", "-n", "0", "--color=no", "--tb=line", *tests]
    outcome = run_apart(command, seconds)
    ended = dict(OUTCOME.findall(outcome.output))
    # Exit code 1 says that tests failed, and which they are.
    return {test: ended.get(test, f"did not end: {outcome.failed}") for test in tests}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[1])
    parser.add_argument("--minutes", type=float, default=24)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    start, seconds, device = time.monotonic(), 60 * args.minutes, file_name_of_device("cuda")
    args.output.mkdir(parents=True, exist_ok=True)
    is_healthy = run_doctor(args.output / f"gpu_doctor_{device}.json", SHARE_OF_DOCTOR * seconds)
    tests = run_tests(args.output / f"gpu_tests_{device}.json", SHARE_OF_TESTS * seconds)
    wrong = [test for test, outcome in tests.items() if outcome not in ("PASSED", "SKIPPED")]
    left = seconds - (time.monotonic() - start)
    step = [sys.executable, "-m", "benchmarks.gpu_step", "--seconds", str(left), "--output", str(args.output)]
    outcome = run_apart(step, left + 60)
    print(outcome.output)
    print(
        f"doctor {'is content' if is_healthy else 'has complaints'}; {len(wrong)} of {len(tests)} tests did not pass"
    )
    if outcome.failed:
        print(f"benchmarks.gpu_step: {outcome.failed}")
    raise SystemExit(0 if is_healthy and not wrong and not outcome.failed else 1)


if __name__ == "__main__":
    main()
