"""
Measure what the check before the first step costs: on two sizes of model in two precisions, and on two ranks.

    python -m benchmarks.self_check

Its time, with that of own rows, is compared with that of one forward of 128 tokens, in turn in the same process; and
the time in which a model is compared with what was measured, once per batch, is the shortest of many.
"""

import argparse
import json
import os
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.machine import describe
from benchmarks.model_shapes import QWEN3
from trl_singlepass import DataCollatorForSinglePass, enable_tree
from trl_singlepass.engine.check.tree_check import TreeCheck
from trl_singlepass.training.self_check import Fingerprint
from trl_singlepass.trees.sample import Sample


RESULTS = Path(__file__).parent / "results" / "self_check.json"
SIZES: dict[str, dict[str, Any]] = {
    "0.6B": {**QWEN3, "num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072,
             "num_attention_heads": 16, "tie_word_embeddings": True},
    "60M": {**QWEN3, "vocab_size": 32_000, "num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 2048,
            "num_attention_heads": 8, "tie_word_embeddings": True},
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ENGINES: dict[str, Callable[[Any], Any]] = {
    "one process": lambda model: model,
    "DDP, 2 ranks": DistributedDataParallel,
    "FSDP2, 2 ranks": lambda model: [fully_shard(layer) for layer in model.model.layers] and fully_shard(model),
}
YARDSTICK = 128  # tokens
SECONDS = 4.0  # for a check, own rows included


def build(size: str, dtype: torch.dtype) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES[size], attn_implementation="sdpa"))
    torch.set_default_dtype(torch.float32)
    return model


def measure(size: str, dtype: str, engine: str, repeats: int) -> dict[str, Any]:
    """Return the cost of the check of one model, the median of some repetitions after a first."""
    model = build(size, DTYPES[dtype])
    enable_tree(model, check=False)
    wrapped = ENGINES[engine](model)
    tokens: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    text = np.random.default_rng(0).integers(0, SIZES[size]["vocab_size"], 200)
    samples = [Sample(np.roll(text, -start)[:150], np.r_[np.zeros(50), np.ones(100)], 1) for start in (0, 1)]
    yardstick = torch.from_numpy(np.resize(text, YARDSTICK))[None]
    checks, forwards, reports, own = [], [], [], []
    for _ in range(repeats + 1):
        tokens.clear()
        check = TreeCheck(wrapped, DataCollatorForSinglePass(0))
        reports.append(check.run(text))
        counted = list(tokens)
        own.append(check.run_own(samples, SECONDS - reports[-1].seconds))
        with torch.no_grad():
            start = time.perf_counter()
            model(input_ids=yardstick, use_cache=False)
            forwards.append(time.perf_counter() - start)
        checks.append(reports[-1].seconds)
    assert all(report.ok for report in reports), reports
    return {
        "model": size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": dtype,
        "engine": engine,
        "threads": torch.get_num_threads(),
        "forwards": len(counted),
        "forward_tokens": sum(counted),
        "seconds": median(checks[1:]),
        "own_tokens": max(0 if one is None else one.longest for one in own),
        "own_seconds": median(0.0 if one is None else one.seconds for one in own[1:]),
        "milliseconds_per_batch": 1e3 * min(timeit.repeat(lambda: Fingerprint.of(wrapped), number=1, repeat=100)),
        "forward_seconds": median(forwards[1:]),
        "difference": reports[-1].difference,
    }


def on_rank(rank: int, size: str, dtype: str, engine: str, repeats: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    result = measure(size, dtype, engine, repeats)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort an ordinary exit


def measure_on_two_ranks(size: str, dtype: str, engine: str, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_rank, (size, dtype, engine, repeats, folder), nprocs=2)
        result: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--dry-run", action="store_true", help="print the results instead of writing them")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    results = [measure(size, dtype, "one process", arguments.repeats) for size in arguments.sizes for dtype in DTYPES]
    for engine in list(ENGINES)[1:]:
        results.append(measure_on_two_ranks(arguments.sizes[-1], "float32", engine, arguments.repeats))
    print(json.dumps(results, indent=2))
    if not arguments.dry_run:
        RESULTS.write_text(json.dumps({**describe("cpu", "self_check"), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
