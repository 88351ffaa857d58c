"""
Measure time and peak memory of one training step on one conversation: single pass, N-pass, and the alternatives.

There are three kinds of N-pass. The alternatives train the last turn only, or keep all reasoning in one pass.

    python -m benchmarks.step_time                     speed: the tables of the README and of docs/benchmarks.md
    python -m benchmarks.step_time --shapes            conversations in the shape of real ones (benchmarks/shapes/)
    python -m benchmarks.step_time --memory            memory of a 16k-token row against a plain causal row

Each measurement runs in its own process: memory is that of a first step, time that of later ones. Modes alternate, so
that a slow minute of the machine affects all of them. On a CPU, time is the CPU time of one thread, which other
programs hardly disturb; on a GPU, it is wall time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, set_seed

from benchmarks.machine import describe
from benchmarks.modes import MODES, Step
from benchmarks.shapes import SHAPES, make_samples, read_shapes
from trl_singlepass import PrefixTree, Sample
from trl_singlepass.cost import ModelShape, npass_cost, single_pass_cost
from trl_singlepass.reference.peak_memory import peak, reset_peak
from trl_singlepass.reference.random_conversations import Sizes, conversation


RESULTS = Path(__file__).parent / "results"
# With more tokens than this (8 turns), all samples at once need over 4 GB of activations, and are never the fastest.
MOST_TOKENS_AT_ONCE = 10_000
# The C library keeps memory that is freed. By default, it returns large blocks to Linux, which clears and maps them
# anew when they are used: up to a quarter of a step on a CPU, and more the larger a row's tensors are.
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**35), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
# A process takes so many steps at most, the fastest of which counts, and only as many as have this many N-pass tokens:
# long steps scatter less.
MOST_STEPS = 5
TOKENS_OF_STEPS = 15_000
NPASS_MODES = ("npass_sequential", "npass_padded", "npass_packed")
EXACT_MODES = ("single_pass", *NPASS_MODES)
SPEED_MODES = (*EXACT_MODES, "last_turn", "keep_reasoning")
MEMORY_MODES = ("single_pass", "causal_row")
MODEL = {
    "num_hidden_layers": 6,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 32_000,
    "max_position_embeddings": 65_536,
    "tie_word_embeddings": False,
}
# Small enough to run in a second, to try out the script rather than to measure.
TINY_MODEL = {**MODEL, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 500}
TINY_SIZES = Sizes(user=(5, 10), reasoning=(30, 100), answer=(10, 20), system=5)


@dataclass(frozen=True)
class Case:
    """One measurement, with plain fields only, so that it can be passed to its own process as JSON."""

    mode: str
    turns: int
    seed: int
    tiny: bool
    device: str
    dtype: str
    shape: str = ""  # name of a file of shapes, in which `seed` is the index; random conversations if empty

    @property
    def model(self) -> dict[str, Any]:
        return TINY_MODEL if self.tiny else MODEL

    def samples(self, keep: bool = False) -> list[Sample]:
        if self.shape:
            shape = read_shapes(self.shape)[self.seed]["keep" if keep else "template"]
            return make_samples(shape, self.model["vocab_size"])
        sizes = TINY_SIZES if self.tiny else Sizes()
        return conversation(self.turns, self.model["vocab_size"], self.seed, sizes, keep=keep)

    @property
    def num_steps(self) -> int:
        """Number of steps whose time is measured."""
        return min(MOST_STEPS, max(1, TOKENS_OF_STEPS // sum(map(len, self.samples()))))

    @property
    def fits(self) -> bool:
        """Whether the mode is worth its memory: whole batches of samples soon stop being so."""
        samples = self.samples() if self.mode in NPASS_MODES else []
        return {
            "npass_padded": len(samples) * max(map(len, samples), default=0) <= MOST_TOKENS_AT_ONCE,
            "npass_packed": sum(map(len, samples)) <= MOST_TOKENS_AT_ONCE,
        }.get(self.mode, True)


def measure(case: Case) -> dict[str, Any]:
    """Run steps in this process: peak memory is that of the first, time that of the fastest of the others."""
    torch.set_num_threads(1)
    set_seed(0)
    config = Qwen3Config(**case.model)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype)).to(case.device)
    loss = MODES[case.mode](Step(model, case.samples(), case.samples(keep=True)))
    before = reset_peak()
    loss()
    used = peak() - before
    seconds = []
    for _ in range(case.num_steps):
        model.zero_grad()
        start = now()
        value = loss()
        seconds.append(now() - start)
    norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm()
    return {
        "mode": case.mode,
        "turns": case.turns,
        **({"shape": case.shape, "index": case.seed} if case.shape else {}),
        "seconds": min(seconds),
        "bytes": used,
        "loss": value,
        "norm": float(norm),
    }


def now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure_apart(case: Case) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.step_time", "--case", json.dumps(vars(case))]
    environment = {**os.environ, **KEPT_MEMORY}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{case} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{case.turns:3} turns  {case.mode:17} {result['seconds']:8.2f} s {result['bytes'] / 2**20:8.0f} MiB",
        flush=True,
    )
    return result


def counted(case: Case) -> dict[str, Any]:
    """Return the counted cost of both ways and the speed-up that it predicts."""
    samples = case.samples()
    tree, shape = PrefixTree.from_samples(samples), ModelShape.from_config(Qwen3Config(**case.model))
    npass, single = npass_cost(samples, shape), single_pass_cost([tree], shape)
    return {
        "turns": case.turns,
        **({"shape": case.shape, "index": case.seed} if case.shape else {}),
        "trained_tokens": sum(len(sample) - sample.prompt_length for sample in samples),
        "last_turn_trained_tokens": len(samples[-1]) - samples[-1].prompt_length,
        "npass_tokens": npass.tokens,
        "row_tokens": single.tokens,
        "npass_flops": npass.flops,
        "single_pass_flops": single.flops,
        "predicted_speedup": npass.flops / single.flops,
    }


def seed_of_length(turns: int, tokens: int, tiny: bool) -> int:
    """Return the seed of the conversation whose row is closest to a given length."""
    seeds = [Case("", turns, seed, tiny, "", "") for seed in range(200)]
    return min(seeds, key=lambda case: abs(len(PrefixTree.from_samples(case.samples())) - tokens)).seed


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.step_time", description=__doc__.splitlines()[1])
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument(
        "--repeats", type=int, default=2, help="number of processes per mode, of which the fastest is reported"
    )
    parser.add_argument("--memory", action="store_true", help="measure a 16k-token row against a plain causal one")
    parser.add_argument("--shapes", action="store_true", help="measure conversations in the shape of real ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--name", help="name of the file under benchmarks/results/")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try out the script")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.case:
        print(json.dumps(measure(Case(**json.loads(args.case)))))
        return
    kind = "row_memory" if args.memory else "step_time_shapes" if args.shapes else "step_time"
    modes = MEMORY_MODES if args.memory else EXACT_MODES if args.shapes else SPEED_MODES
    cases = cases_of(args)
    result: dict[str, Any] = {
        "kind": kind,
        **describe(args.device),
        "model": TINY_MODEL if args.tiny else MODEL,
        "dtype": args.dtype,
        "environment": KEPT_MEMORY,
        "counted": [counted(case) for case in cases],
        "measured": [],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.name or f'{kind}_{args.device}_{args.dtype}'}.json"
    for case in cases:
        runs = [replace(case, mode=mode) for _ in range(args.repeats) for mode in modes]
        result["measured"] += [measure_apart(run) for run in runs if run.fits]
        path.write_text(json.dumps(result, indent=1) + "\n")  # what has been measured so far
    print(path)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Return the cases to measure, in every mode."""
    common = {"mode": "", "tiny": args.tiny, "device": args.device, "dtype": args.dtype}
    if args.shapes:
        names = sorted(path.stem for path in SHAPES.glob("*.json"))
        return [
            Case(turns=len(shape["template"]), seed=index, shape=name, **common)
            for name in names
            for index, shape in enumerate(read_shapes(name))
        ]
    if args.memory:
        return [Case(turns=16, seed=seed_of_length(16, 1_600 if args.tiny else 16_384, args.tiny), **common)]
    return [Case(turns=turns, seed=0, **common) for turns in args.turns]


if __name__ == "__main__":
    main()
