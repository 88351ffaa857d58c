"""
Profile a step of a row and of N-pass on a CPU: which operations take the time, and what the system does for memory.

    python -m benchmarks.step_profile

PyTorch's profiler attributes time to operations. How much of a step Linux spends on clearing and mapping memory is
counted without it, in processes of their own: once as the C library returns memory by default, once with memory kept.
"""

import argparse
import json
import resource
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import describe
from benchmarks.step_time import KEPT_MEMORY, MODEL, RESULTS, TINY_MODEL, Case, prepare, run_apart


MODES = ("single_pass", "npass_sequential")
KINDS = ("matrix products", "attention", "everything else")
# Names of environments in which a step is counted: the C library's default, and that of the benchmarks.
ENVIRONMENTS: dict[str, dict[str, str]] = {"returned": {}, "kept": KEPT_MEMORY}


def kind_of(operation: str) -> str:
    """Return the kind of an operation by its name: `aten::mm` is a matrix product."""
    if operation.removeprefix("aten::") in ("mm", "addmm", "bmm"):
        return "matrix products"
    return "attention" if "scaled_dot_product" in operation else "everything else"


def seconds_by_kind(case: Case) -> dict[str, float]:
    """Take one step under PyTorch's profiler; return the seconds of each kind of operation, without those it calls."""
    _, step = prepare(case, case.samples())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return seconds


def use_of_system(case: Case) -> dict[str, float]:
    """Take two steps; return the seconds of the second in the program and in Linux, and how many pages it mapped."""
    model, step = prepare(case, case.samples())
    step()
    model.zero_grad()
    before = resource.getrusage(resource.RUSAGE_SELF)
    step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "user_seconds": after.ru_utime - before.ru_utime,
        "system_seconds": after.ru_stime - before.ru_stime,
        "page_faults": after.ru_minflt - before.ru_minflt,
    }


MEASUREMENTS = {"operations": seconds_by_kind, "memory": use_of_system}


def measure_apart(measurement: str, case: Case, environment: dict[str, str]) -> dict[str, float]:
    """Run one measurement in a fresh process, and print its result."""
    result: dict[str, float] = run_apart(
        {"measurement": measurement, "case": vars(case)}, environment, module="step_profile"
    )
    print(case.mode, measurement, json.dumps(result), flush=True)
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.step_profile", description=__doc__.splitlines()[1])
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try out the script")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--apart", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.apart:
        torch.set_num_threads(1)
        what = json.loads(args.apart)
        print(json.dumps(MEASUREMENTS[what["measurement"]](Case(**what["case"]))))
        return
    result: dict[str, Any] = {
        **describe("cpu", "step_profile"),
        "model": TINY_MODEL if args.tiny else MODEL,
        "dtype": "float32",
        "turns": args.turns,
        "environment": KEPT_MEMORY,
        "operations": {},
        "memory": {},
    }
    for mode in MODES:
        case = Case(mode, args.turns, 0, args.tiny, "cpu", "float32")
        result["operations"][mode] = measure_apart("operations", case, KEPT_MEMORY)
        result["memory"][mode] = {
            name: measure_apart("memory", case, environment) for name, environment in ENVIRONMENTS.items()
        }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "step_profile_cpu_float32.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
