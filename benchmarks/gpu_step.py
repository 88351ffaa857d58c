"""
Measure whole training steps on one GPU: a single pass on every available kernel, N-pass, and a plain causal row.

    python -m benchmarks.gpu_step                     about 8 minutes on an H100
    python -m benchmarks.gpu_step --device cpu --tiny --turns 2 3

A step is a forward pass with gradient checkpointing, a backward pass and AdamW in bfloat16. Weights are random, in the
shapes of Qwen3-0.6B, Qwen3-1.7B and a small hybrid. Packed N-pass is a row of separate samples on the same kernels, so
the two differ only in sharing. Kernels that are not installed and cases that run out of memory or time are recorded as
such. Writes benchmarks/results/gpu_step_<device>.json.
"""

import argparse
import gc
import json
import re
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.modes import MODES, Step
from benchmarks.step_time import TINY_SIZES
from trl_singlepass import PrefixTree, Sample
from trl_singlepass.attention import TREE_ATTENTION, tree_context
from trl_singlepass.attention.block_mask import build_block_mask
from trl_singlepass.attention.context import Tree
from trl_singlepass.attention.tree_mask import TreeMask
from trl_singlepass.attention.varlen_plan import varlen_calls
from trl_singlepass.cost import ModelShape, npass_cost, single_pass_cost
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.reference.peak_memory import peak, reset_peak
from trl_singlepass.reference.random_conversations import Sizes, conversation
from trl_singlepass.training.model import enable_tree
from trl_singlepass.trees.rows import Row, TreePlan


RESULTS = Path(__file__).parent / "results"
QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
DECODERS = {
    "qwen3-0.6b": {**QWEN3, "num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072},
    "qwen3-1.7b": {**QWEN3, "num_hidden_layers": 28, "hidden_size": 2048, "intermediate_size": 6144},
}
HYBRID = {
    "vocab_size": 32000, "num_hidden_layers": 8, "hidden_size": 1024, "intermediate_size": 3072,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "linear_num_key_heads": 8,
    "linear_num_value_heads": 8, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
TINY = {
    "vocab_size": 500, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2,
    "num_attention_heads": 4, "head_dim": 16,
}  # fmt: skip
# "flex_attention:FLASH" is FlexAttention on FlashAttention 4.
KERNELS = [
    *TREE_ATTENTION, "flex_attention:FLASH", "kernels-community/flash-attn2", "kernels-community/flash-attn3",
    "kernels-community/vllm-flash-attn3",
]  # fmt: skip


def build(name: str, device: str, tiny: bool) -> Any:
    """Return a random model in bfloat16 with gradient checkpointing."""
    torch.manual_seed(0)
    sizes = {"max_position_embeddings": 65536, "num_attention_heads": 16, **(DECODERS.get(name) or HYBRID)}
    sizes.update(TINY if tiny else {})
    if name == "hybrid":
        if tiny:
            sizes.update(linear_key_head_dim=16, linear_value_head_dim=16)
        config = transformers.Qwen3_5TextConfig(**sizes)
        model = transformers.Qwen3_5ForCausalLM(config)
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    model.to(device, torch.bfloat16).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def tree_step(step: Step, sample_sets: list[list[Sample]]) -> Callable[[], float]:
    """One row with a tree per set of samples: a single set is a single pass, one set per sample is packed N-pass."""
    rows = [Row.from_tree(PrefixTree.from_samples(samples)).columns() for samples in sample_sets]
    batch = DataCollatorForSinglePass(pad_token_id=0)(rows)
    plan = batch.pop("tree_plan")
    tensors = {name: tensor.to(step.device) for name, tensor in batch.items()}
    labels, subtree_end = tensors["labels"][0], tensors["subtree_end"]
    predicting = (labels != -100).nonzero()[:, 0] - 1
    inputs = {name: tensors[name] for name in ("input_ids", "position_ids", "attention_mask")}

    def loss() -> float:
        with tree_context(plan, subtree_end, inputs["position_ids"]):
            hidden = step.decoder(**inputs)[0]
        return step.backward(hidden[predicting], labels[predicting + 1])

    return loss


def cases(samples: list[Sample], kernels: list[str], is_hybrid: bool) -> Iterator[tuple[str, str | None, Any]]:
    """Yield name, kernel and step function for every way of training one conversation."""
    for kernel in kernels:
        yield "single_pass", kernel, lambda step: tree_step(step, [samples])
        yield "npass_packed", kernel, lambda step: tree_step(step, [[sample] for sample in samples])
    yield "npass_padded", None, MODES["npass_padded"]
    if not is_hybrid:
        yield "causal_row", None, MODES["causal_row"]


def available_kernels(device: str, tiny: bool) -> tuple[list[str], dict[str, str]]:
    """Return the kernels that can train a small step on this machine, and why the others cannot."""
    found, missing = [], {}
    samples = conversation(2, 400, 0, TINY_SIZES)
    for kernel in KERNELS:
        if kernel == "eager":  # the same as sdpa
            continue
        model = build("qwen3-0.6b", device, tiny)
        try:
            choose(model, kernel)
            tree_step(Step(model, samples), [samples])()
            found.append(kernel)
        except Exception as error:  # packages may raise anything: report it and leave the kernel out
            missing[kernel] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        del model
        collect()
    return found, missing


def choose(model: Any, kernel: str) -> None:
    """Switch a model to tree attention on a kernel, as loading it with `attn_implementation` would."""
    model.set_attn_implementation("sdpa")
    model.config._attn_implementation_internal, _, backend = kernel.partition(":")
    model.config.kernel_options = {"BACKEND": backend} if backend else None
    enable_tree(model)


def measure(model: Any, samples: list[Sample], kernel: str | None, make: Any, repeats: int) -> dict[str, Any]:
    """Return the best time of a whole step, its loss, and the peak memory above model and optimizer."""
    if kernel is None:
        model.set_attn_implementation("sdpa")
    else:
        choose(model, kernel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=model.device.type == "cuda")
    loss, times, value = make(Step(model, samples)), [], 0.0
    before = 0
    for repeat in range(repeats + 1):
        if repeat == 1:  # the first repetition compiles kernels and creates the optimizer's state
            before = reset_peak()
        start = now(model.device.type)
        value = loss()
        optimizer.step()
        optimizer.zero_grad()
        times.append(now(model.device.type) - start)
    return {"seconds": min(times[1:]), "all_seconds": times[1:], "loss": value, "bytes": peak() - before}


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def counted(samples: list[Sample], config: Any) -> dict[str, Any]:
    tree, shape = PrefixTree.from_samples(samples), ModelShape.from_config(config)
    npass, single = npass_cost(samples, shape), single_pass_cost([tree], shape)
    return {
        "npass_tokens": npass.tokens, "row_tokens": single.tokens, "npass_flops": npass.flops,
        "single_pass_flops": single.flops, "bound": npass.flops / single.flops,
    }  # fmt: skip


def planning(samples: list[Sample], device: str) -> dict[str, float]:
    """Return the seconds on the host for the plan and what kernels derive from it, until the device has both."""
    row = Row.from_tree(PrefixTree.from_samples(samples))
    plan = TreePlan.from_rows([row])
    end, depth = (torch.from_numpy(x).to(device)[None] for x in (row.subtree_end, plan.depths()))
    causal = transformers.masking_utils.causal_mask_function
    parts = {
        "plan": lambda: TreePlan.from_rows([row]),
        "block_mask": lambda: build_block_mask(TreeMask(Tree(plan, end, depth), causal), (128, 128)),
        "varlen": lambda: varlen_calls(TreeMask(Tree(plan, end, depth), causal)),
    }
    times = {}
    for name, function in parts.items():
        function()
        start = now(torch.device(device).type)
        function()
        times[name] = now(torch.device(device).type) - start
    return times


def run(args: argparse.Namespace, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one record per case until time runs out."""
    deadline = time.monotonic() + args.seconds
    for name in args.models:
        model = build(name, args.device, args.tiny)
        for turns in args.turns:
            sizes = TINY_SIZES if args.tiny else Sizes()
            samples = conversation(turns, min(model.config.vocab_size, 30000), turns, sizes)
            if name != "hybrid":
                counts = {"model": name, "turns": turns, **counted(samples, model.config)}
                result["counted"].append({**counts, "planning_seconds": planning(samples, args.device)})
            for mode, kernel, make in cases(samples, result["kernels"], name == "hybrid"):
                record = {"model": name, "turns": turns, "mode": mode, "kernel": kernel}
                if time.monotonic() > deadline:
                    yield {**record, "failed": "out of time"}
                    continue
                try:
                    record.update(measure(model, samples, kernel, make, args.repeats))
                except torch.OutOfMemoryError:
                    record["failed"] = "out of memory"
                except (RuntimeError, ValueError) as error:
                    record["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                yield record
                model.zero_grad()
                collect()
        del model
        collect()


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": str(torch.version.cuda)}
    for name in ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "kernels", "flash-linear-attention"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_step", description=__doc__.splitlines()[1])
    parser.add_argument("--models", nargs="+", default=[*DECODERS, "hybrid"], choices=[*DECODERS, "hybrid"])
    parser.add_argument("--turns", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument(
        "--repeats", type=int, default=3, help="number of repetitions, of which the fastest is reported"
    )
    parser.add_argument(
        "--seconds", type=float, default=480, help="time limit; cases that would start later are left out"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try out the script")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    device_name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    kernels, missing = available_kernels(args.device, args.tiny)
    print(f"{device_name}: kernels {', '.join(kernels)}")
    result: dict[str, Any] = {
        "kind": "gpu_step", "device": device_name, "versions": versions(), "dtype": "bfloat16", "tiny": args.tiny,
        "kernels": kernels, "not_available": missing, "counted": [], "measured": [],
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"gpu_step_{re.sub(r'[^a-z0-9]+', '_', device_name.lower())}.json"
    for record in run(args, result):
        result["measured"].append(record)
        path.write_text(
            json.dumps(result, indent=1) + "\n"
        )  # after each case, since the next one may crash the process
        outcome = record.get("failed") or f"{record['seconds']:.3f} s {record['bytes'] / 2**20:.0f} MiB"
        print(f"{record['model']:11} {record['turns']:3} turns {record['mode']:13} {record['kernel']!s:18} {outcome}")
    print(path)


if __name__ == "__main__":
    main()
