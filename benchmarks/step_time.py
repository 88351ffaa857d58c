"""
Measure time and peak memory of a training step on one conversation: single pass, waves, N-pass, the alternatives.

There are three kinds of N-pass. The alternatives train the last turn only, or keep all reasoning in one pass.

    python -m benchmarks.step_time                     speed: the tables of the README and of docs/performance.md
    python -m benchmarks.step_time --shapes            conversations in the shape of real ones (benchmarks/shapes/)
    python -m benchmarks.step_time --memory            memory of a 16k-token row against a plain causal row

Times are measured in one process that takes a step of each mode in turn, so that a slow minute of the machine affects
all of them. On a CPU, time is the CPU time of one thread, which other programs hardly disturb; on a GPU, it is wall
time. Memory is measured in a process of its own, of the single pass, of waves and of the fastest N-pass.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, set_seed

from benchmarks.machine import describe
from benchmarks.modes import HEAD_CHUNK, MODES, Step
from benchmarks.shapes import SHAPES, make_samples, read_shapes
from trl_singlepass import PrefixTree, Sample
from trl_singlepass.cost import ModelShape, npass_cost, single_pass_cost
from trl_singlepass.cost.memory import ActivationBytes
from trl_singlepass.engine.wave_plan import WavePlan
from trl_singlepass.reference.timing import Sizes, conversation, peak, reset_peak, wave_tokens_that_keep_the_history
from trl_singlepass.trees.rows import TreePlan


RESULTS = Path(__file__).parent / "results"
# With more tokens than this (8 turns), all samples at once need too much memory for activations.
MOST_TOKENS_AT_ONCE = 10_000
# The C library keeps memory that is freed. By default, it returns large blocks to Linux, which clears and maps them
# anew for the next tensor, which costs a row more than a sample, since its tensors are larger.
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**35), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
# The median of so many steps counts, and of fewer if they have more N-pass tokens than this: long steps scatter less.
MOST_STEPS = 3
TOKENS_OF_STEPS = 60_000
MOST_TURNS_OF_OTHERS = 16
NPASS_MODES = ("npass_sequential", "npass_padded", "npass_packed")
EXACT_MODES = ("single_pass", "waves", *NPASS_MODES)
OTHERS = ("last_turn", "keep_reasoning")
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
    def row_tokens(self) -> int:
        return len(PrefixTree.from_samples(self.samples()))

    @property
    def activations(self) -> ActivationBytes:
        return ActivationBytes.from_config(Qwen3Config(**self.model), 4, checkpointing=False)

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
            **dict.fromkeys(OTHERS, self.turns <= MOST_TURNS_OF_OTHERS),
        }.get(self.mode, True)


def prepare(case: Case, samples: Sequence[Sample]) -> tuple[PreTrainedModel, Callable[[], float]]:
    """Return a model and a step of it on samples."""
    set_seed(0)
    config = Qwen3Config(**case.model)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype)).to(case.device)
    return model, MODES[case.mode](Step(model, samples, case.samples(keep=True)))


def measure_memory(case: Case) -> int:
    """Take one step in this process, and return its peak memory."""
    samples = case.samples()
    if case.mode == "npass_sequential":  # its peak is in the longest sample, beside the gradients of another one
        samples = [samples[0], max(samples, key=len)]
    _, step = prepare(case, samples)
    before = reset_peak()
    step()
    return peak() - before


def measure_times(case: Case, modes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Take steps of all modes in this process in turn: the median seconds of each, its loss and norm of gradients."""
    steps = {mode: prepare(replace(case, mode=mode), case.samples()) for mode in modes}
    if case.device == "cpu":
        torch.ones(
            max(case.row_tokens, MOST_TOKENS_AT_ONCE) * case.activations.per_token // 4
        )  # mapped once, and kept
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    losses = {}
    # A GPU selects and compiles kernels in a first step of each shape.
    for _ in range(case.num_steps + (case.device != "cpu")):
        for mode, (model, step) in steps.items():
            model.zero_grad()
            start = now()
            losses[mode] = step()
            seconds[mode].append(now() - start)
    return {
        mode: {"seconds": median(seconds[mode]), "loss": losses[mode], "norm": gradient_norm(model)}
        for mode, (model, _) in steps.items()
    }


def gradient_norm(model: PreTrainedModel) -> float:
    return float(torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm())


def now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure_apart(case: Case, modes: Sequence[str]) -> list[dict[str, Any]]:
    """Measure the times of all modes in one process, and the memory of those in the tables in a process of its own."""
    modes = [mode for mode in modes if replace(case, mode=mode).fits]
    times: dict[str, dict[str, float]] = {mode: {} for mode in modes}
    if modes != list(MEMORY_MODES):
        times = run_apart({"case": vars(case), "modes": modes}, KEPT_MEMORY)
        fastest = min((mode for mode in modes if mode in NPASS_MODES), key=lambda mode: times[mode]["seconds"])
        modes = ["single_pass", "waves", fastest]
    for mode in modes:
        times[mode]["bytes"] = run_apart({"case": vars(replace(case, mode=mode))}, {})
    common = {"turns": case.turns, **({"shape": case.shape, "index": case.seed} if case.shape else {})}
    measured = [{"mode": mode, **common, **found} for mode, found in times.items()]
    for one in measured:
        print(json.dumps(one), flush=True)
    return measured


def run_apart(what: dict[str, Any], environment: dict[str, str], module: str = "step_time") -> Any:
    """Run one measurement of a module in a fresh process."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--apart", json.dumps(what)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode != 0:
        raise SystemExit(f"{what} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(what: dict[str, Any]) -> Any:
    """Run one measurement in this process."""
    torch.set_num_threads(1)
    case = Case(**what["case"])
    return measure_times(case, what["modes"]) if "modes" in what else measure_memory(case)


def counted(case: Case) -> dict[str, Any]:
    """Return the counted cost of both ways and the speed-up that it predicts."""
    samples = case.samples()
    tree, shape = PrefixTree.from_samples(samples), ModelShape.from_config(Qwen3Config(**case.model))
    npass, single = npass_cost(samples, shape), single_pass_cost([tree], shape)
    plan = TreePlan.from_subtree_end(tree.subtree_end)
    waves = WavePlan.from_tree_plan(plan, wave_tokens_that_keep_the_history(plan))
    head = 3 * 4 * HEAD_CHUNK * case.model["vocab_size"]  # logits of a chunk, their float32 copy and their gradient
    history = 2 * waves.cached_tokens * case.activations.key_value  # keys and values, and their gradients
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
        "row_bytes": len(tree) * case.activations.per_token + head,
        "waves": len(waves.waves),
        "waves_bytes": waves.peak_tokens * case.activations.per_token + history + head,
    }


def seed_of_length(turns: int, tokens: int, tiny: bool) -> int:
    """Return the seed of the conversation whose row is closest to a given length."""
    seeds = [Case("", turns, seed, tiny, "", "") for seed in range(200)]
    return min(seeds, key=lambda case: abs(len(PrefixTree.from_samples(case.samples())) - tokens)).seed


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.step_time", description=__doc__.splitlines()[1])
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--memory", action="store_true", help="measure a 16k-token row against a plain causal one")
    parser.add_argument("--shapes", action="store_true", help="measure conversations in the shape of real ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--name", help="name of the file under benchmarks/results/")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try out the script")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--apart", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.apart:
        print(json.dumps(run(json.loads(args.apart))))
        return
    kind, modes = kind_of(args)
    cases = cases_of(args)
    result: dict[str, Any] = {
        **describe(args.device, kind),
        "model": TINY_MODEL if args.tiny else MODEL,
        "dtype": args.dtype,
        "environment": KEPT_MEMORY,
        "counted": [counted(case) for case in cases],
        "measured": [],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.name or f'{kind}_{args.device}_{args.dtype}'}.json"
    for case in cases:
        result["measured"] += measure_apart(case, modes)
        path.write_text(json.dumps(result, indent=1) + "\n")  # what has been measured so far
    print(path)


def kind_of(args: argparse.Namespace) -> tuple[str, Sequence[str]]:
    """Return the kind of the results, and the modes that it compares."""
    if args.memory:
        return "row_memory", MEMORY_MODES
    return ("step_time_shapes", EXACT_MODES) if args.shapes else ("step_time", (*EXACT_MODES, *OTHERS))


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
