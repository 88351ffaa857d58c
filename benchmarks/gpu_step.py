"""
Measure whole training steps on one GPU: a single pass on every available kernel, in waves, N-pass, a plain causal row.

    python -m benchmarks.gpu_step                     for 15 minutes; the same line goes on where it stopped
    python -m benchmarks.gpu_step --device cpu --tiny --turns 2 3

A step is a forward pass with gradient checkpointing, a backward pass and AdamW in bfloat16. Weights are random, in the
shapes of released models, of which some layers run. Packed N-pass is a row of separate samples on the same kernel, so
the two differ only in sharing. Each case runs in a process of its own and is written down, failures with their reason,
to benchmarks/results/gpu_step_<device>.json.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.apart import run_apart
from benchmarks.freshness import code_of
from benchmarks.launches import LaunchCounter
from benchmarks.machine import describe, file_name_of_device
from benchmarks.model_shapes import get_config, make_model
from benchmarks.modes import MODES, Step
from benchmarks.step_time import TINY_SIZES
from trl_singlepass import PrefixTree, Sample
from trl_singlepass.attention import TREE_ATTENTION
from trl_singlepass.attention.registry import tree_attention_name
from trl_singlepass.cost import ModelShape, npass_cost, single_pass_cost
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.reference.timing import Schedule, Sizes, conversation, make_step, peak, reset_peak


RESULTS = Path(__file__).parent / "results"
# How many layers run. The hybrid comes second: where time is short, it is not what is left out.
LAYERS = {"Qwen3-0.6B": 28, "Qwen3.5-4B": 8, "Qwen3-8B": 8, "gpt-oss-20b": 4}
TINY = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
TINY_EXTRA = {
    "Qwen3.5-4B": {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
                   "linear_value_head_dim": 16},
    "gpt-oss-20b": {"num_local_experts": 4},
}  # fmt: skip
# "flex_attention:FLASH" is FlexAttention on FlashAttention 4.
KERNELS = [
    *TREE_ATTENTION, "flex_attention:FLASH", "kernels-community/flash-attn2", "kernels-community/flash-attn3",
    "kernels-community/vllm-flash-attn3",
]  # fmt: skip
SAME_AS_SDPA = ("eager", "torch_varlen")
# Without trees, on the model's own attention: a padded batch of samples, and a row of the tree's length.
STOCK_MODES = ("npass_padded", "causal_row")
# Under `sdpa`, PyTorch takes cuDNN on Hopper, and FlashAttention 2 on older GPUs: both are measured.
SDPA_BACKENDS = {"stock:cudnn": SDPBackend.CUDNN_ATTENTION, "stock:flash": SDPBackend.FLASH_ATTENTION}
SECONDS_PER_CASE = 180.0


@dataclass(frozen=True)
class Case:
    """One measurement; everything in it is plain, so that it travels to a process of its own as JSON."""

    model: str
    turns: int
    schedule: str
    kernel: str
    device: str = "cuda"
    tiny: bool = False
    repeats: int = 3

    def config(self) -> transformers.PreTrainedConfig:
        if not self.tiny:
            return get_config(self.model, LAYERS[self.model])
        return get_config(self.model, 4, **TINY, num_key_value_heads=2, **TINY_EXTRA.get(self.model, {}))

    def samples(self) -> list[Sample]:
        vocabulary = min(self.config().vocab_size, 30_000)
        return conversation(self.turns, vocabulary, self.turns, TINY_SIZES if self.tiny else Sizes())


def cases(kernels: list[str], args: argparse.Namespace) -> Iterator[Case]:
    """Yield every case, the most telling first."""
    common = {"device": args.device, "tiny": args.tiny, "repeats": args.repeats}
    for turns in args.turns:
        for model in args.models:
            for kernel in kernels:
                for schedule in (Schedule.SINGLE_PASS, Schedule.NPASS_PACKED, Schedule.WAVES):
                    if schedule is not Schedule.WAVES or not kernel.startswith("flex_attention"):  # it has none
                        yield Case(model, turns, schedule.value, kernel, **common)
            for mode in STOCK_MODES:
                if mode == "npass_padded" or model != "Qwen3.5-4B":  # a plain row of a hybrid is another computation
                    for kernel in stock_kernels(model, args.device):
                        yield Case(model, turns, mode, kernel, **common)


def stock_kernels(model: str, device: str) -> list[str]:
    """Kernels that a model's own attention can run on; gpt-oss has no choice, and neither has a CPU."""
    return [*SDPA_BACKENDS] if device == "cuda" and model != "gpt-oss-20b" else ["stock"]


def available_kernels() -> tuple[list[str], dict[str, str]]:
    """Kernels that are installed, and why the others are not here."""
    found, missing = [], {}
    for kernel in KERNELS:
        if kernel in SAME_AS_SDPA:
            continue
        try:
            tree_attention_name(kernel.partition(":")[0])
            found.append(kernel)
        except Exception as error:  # the Hub client and packages raise many kinds
            missing[kernel] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return found, missing


def measure(case: Case) -> dict[str, Any]:
    """Best time of a whole step, its loss, and the peak of memory above the model and its optimizer."""
    implementation, _, backend = case.kernel.partition(":")
    model = make_model(case.config(), None, case.device)
    if case.schedule not in STOCK_MODES:
        # Not through transformers, which downloads or refuses: the tree version loads what it needs.
        model.config._attn_implementation_internal = implementation
        model.config.kernel_options = {"BACKEND": backend} if backend else None
        enable_tree(model)
    loss = step_of(case, model)
    if case.kernel in SDPA_BACKENDS:
        loss = sdpa_kernel(SDPA_BACKENDS[case.kernel])(loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=model.device.type == "cuda")
    times, value, before = [], 0.0, 0
    for repeat in range(case.repeats + 1):
        if repeat == 1:  # the first compiles kernels and makes the optimizer's state
            before = reset_peak()
        start = now(model.device.type)
        value = float(loss())
        optimizer.step()
        optimizer.zero_grad()
        times.append(now(model.device.type) - start)
    measured = {"seconds": min(times[1:]), "all_seconds": times[1:], "loss": value, "bytes": peak() - before}
    return measured | ({"operators": operators_of(loss)} if case.schedule in STOCK_MODES else {})


def operators_of(loss: Callable[[], object]) -> list[str]:
    """Return PyTorch's attention operators that a step runs."""
    with LaunchCounter() as counter:
        loss()
    return list(counter.attention_operators)


def step_of(case: Case, model: Any) -> Callable[[], float | torch.Tensor]:
    if case.schedule in STOCK_MODES:
        return MODES[case.schedule](Step(model, case.samples()))
    return make_step(model, case.samples(), Schedule(case.schedule))


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def counted(case: Case) -> dict[str, Any]:
    """What the layers that run cost, by counting."""
    samples, shape = case.samples(), ModelShape.from_config(case.config())
    npass, single = npass_cost(samples, shape), single_pass_cost([PrefixTree.from_samples(samples)], shape)
    return {
        "npass_tokens": npass.tokens, "row_tokens": single.tokens, "npass_flops": npass.flops,
        "single_pass_flops": single.flops, "bound": npass.flops / single.flops,
    }  # fmt: skip


def measure_apart(case: Case, seconds: float) -> dict[str, Any]:
    """Run one case in a fresh process."""
    outcome = run_apart([sys.executable, "-m", "benchmarks.gpu_step", "--case", json.dumps(asdict(case))], seconds)
    found = {"failed": outcome.failed} if outcome.failed else json.loads(outcome.output.splitlines()[-1])
    return {**asdict(case), **counted(case), **found}


def run(path: Path, result: dict[str, Any], todo: list[Case], seconds: float) -> int:
    """Measure the cases that the file does not hold yet, until the time is up; return how many are left."""
    deadline = time.monotonic() + seconds
    key = tuple(asdict(todo[0])) if todo else ()
    measured = {tuple(record[name] for name in key) for record in result["measured"]}
    todo = [case for case in todo if tuple(asdict(case).values()) not in measured]
    for index, case in enumerate(todo):
        left = deadline - time.monotonic()
        if left <= 0:
            return len(todo) - index
        record = measure_apart(case, min(left, SECONDS_PER_CASE))
        if record.get("failed", "").startswith("took longer") and left < SECONDS_PER_CASE:
            return len(todo) - index  # not its fault: it gets all its time in the next run
        result["measured"].append(record)
        path.write_text(json.dumps(result, indent=1) + "\n")  # after each case, in case this process is ended
        outcome = record.get("failed") or f"{record['seconds']:.3f} s {record['bytes'] / 2**20:.0f} MiB"
        print(f"{case.model:11} {case.turns:3} turns {case.schedule:13} {case.kernel:18} {outcome}", flush=True)
    return 0


def load_result(path: Path, device: str, kernels: list[str], missing: dict[str, str]) -> dict[str, Any]:
    """What was measured of this code before, or an empty result."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if found.get("code") == code_of("gpu_step"):
            return {**found, "kernels": kernels, "not_available": missing}
    return {
        **describe(device, "gpu_step"), "packages": versions(), "dtype": "bfloat16", "kernels": kernels,
        "not_available": missing, "measured": [],
    }  # fmt: skip


def versions() -> dict[str, str]:
    found = {"cuda": str(torch.version.cuda)}
    for name in ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "kernels", "flash-linear-attention"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_step", description=__doc__.splitlines()[1])
    parser.add_argument("--models", nargs="+", default=[*LAYERS], choices=[*LAYERS])
    parser.add_argument("--turns", type=int, nargs="+", default=[16, 32, 8])
    parser.add_argument("--repeats", type=int, default=3, help="the smallest time of so many is reported")
    parser.add_argument("--seconds", type=float, default=900, help="later cases are left for the next run")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that only try the script out")
    parser.add_argument("--retry", action="store_true", help="measure again what failed before")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.case:
        print(json.dumps(measure(Case(**json.loads(args.case)))))
        return
    kernels, missing = available_kernels()
    path = args.output / f"gpu_step_{file_name_of_device(args.device)}.json"
    args.output.mkdir(parents=True, exist_ok=True)
    result = load_result(path, args.device, kernels, missing)
    if args.retry:
        result["measured"] = [record for record in result["measured"] if "failed" not in record]
    left = run(path, result, list(cases(kernels, args)), args.seconds)
    print(f"{path}: {len(result['measured'])} cases, {left} left" + (": run it again to go on" if left else ""))


if __name__ == "__main__":
    main()
