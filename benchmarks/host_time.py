"""
What the host does per layer and step that a GPU would wait for, counted; writes into docs/performance.md.

    python -m benchmarks.host_time            count, and write the table into the page
    python -m benchmarks.host_time --tables   the table only, from the counts as they are
    python -m benchmarks.host_time --row      print the CPU time of a row of 16k tokens outside the model

Operators are all that PyTorch dispatches for a layer, views included, forward and backward; launches are those among
them that start a kernel. Both are counted on meta tensors in bfloat16, on what a GPU would run: PyTorch's varlen
kernel, and the scan of flash-linear-attention as one operator. Stock is packed N-pass without trees: a layer calls one
kernel, however many sequences are packed.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, logging
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from benchmarks.gpu_counts import AGENT, VOCABULARY, on_meta_tensors
from benchmarks.launches import LaunchCounter
from benchmarks.machine import describe
from benchmarks.model_shapes import MODELS, get_config, make_model
from benchmarks.report import replace_between_markers, table
from trl_singlepass.attention.tree_mask import TreeMask
from trl_singlepass.attention.varlen_plan import varlen_plan
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.engine.model_call import as_tree
from trl_singlepass.reference.timing import Schedule, Sizes, conversation, make_step
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row


RESULTS = Path(__file__).parent / "results" / "host_time.json"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
WORKLOADS = {
    "chat, 16 turns": (16, Sizes()),
    "agent, 16 turns": (16, AGENT),
    "chat, 64 turns": (64, Sizes()),
    "agent, 64 turns": (64, AGENT),
}
BUDGETS = {"Qwen3-0.6B": 1.1, "gpt-oss-20b": 1.2, "Qwen3.5-4B": 1.5}
"""Most operators of a layer on a row of 16 turns, as a multiple of stock."""
MANY_TURNS = 1.3
"""So many times as many on a row of 64 turns."""
STOCK = "stock_packed"


def stock_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: None,
    scaling: float,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Call a varlen kernel as transformers does; sinks, which some kernels take, cost nothing."""
    packed = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    borders = options["cu_seq_lens_q"]
    longest, window = query.shape[2], (-1 if sliding_window is None else sliding_window - 1, 0)
    out = varlen_attn(
        *packed, borders, borders, longest, longest, scale=scaling, window_size=window, enable_gqa=True
    )  # fmt: skip
    return out[None], None


AttentionInterface.register(STOCK, stock_attention)
AttentionMaskInterface.register(STOCK, lambda **options: None)


def stock_step(config: PreTrainedConfig, checkpointing: bool) -> Callable[[], object]:
    """Return a step of packed N-pass; on meta tensors, no number depends on how many tokens are packed."""
    model = make_model(config, STOCK, "meta", checkpointing)
    tokens, borders = (torch.empty(1, 4096, dtype=torch.long, device="meta"), torch.empty(17, device="meta"))
    return lambda: model.model(tokens, position_ids=tokens, cu_seq_lens_q=borders)[0].sum().backward()


def tree_step(
    config: PreTrainedConfig, checkpointing: bool, workload: str, schedule: Schedule
) -> Callable[[], object]:
    """Return a step on the tree of a conversation."""
    turns, sizes = WORKLOADS[workload]
    model = make_model(config, "torch_varlen", "meta", checkpointing)
    enable_tree(model)
    return make_step(model, conversation(turns, VOCABULARY, turns, sizes), schedule)


def per_layer(model: str, make: Callable[[PreTrainedConfig], Callable[[], object]]) -> dict[str, float]:
    """Return the mean operators and launches of a layer, from one and two periods of layers."""
    period, counts = MODELS[model][2], []
    for layers in (period, 2 * period):
        with on_meta_tensors():
            step = make(get_config(model, layers))
            step()  # what is made once per row or process
            with LaunchCounter() as counter:
                step()
        counts.append((counter.dispatched, counter.total))
    return {
        name: (two - one) / period for name, one, two in zip(("operators", "launches"), *counts, strict=True)
    }  # fmt: skip


def count(model: str, checkpointing: bool) -> dict[str, Any]:
    """Return what a layer takes in stock packed N-pass, on a row of each workload, and in waves of the first."""
    result: dict[str, Any] = {"model": model, "checkpointing": checkpointing}
    result["stock"] = per_layer(model, lambda config: stock_step(config, checkpointing))
    result["row"] = {workload: count_row(model, workload, checkpointing) for workload in WORKLOADS}
    if checkpointing:
        shortest = next(iter(WORKLOADS))
        result["waves"] = {shortest: count_row(model, shortest, True, Schedule.WAVES)}
    return result


def count_row(
    model: str, workload: str, checkpointing: bool = True, schedule: Schedule = Schedule.SINGLE_PASS
) -> dict[str, float]:
    """Return what a layer takes on the row of a workload."""
    return per_layer(model, lambda config: tree_step(config, checkpointing, workload, schedule))


def budget(model: str, workload: str) -> float:
    """Most operators of a layer on a row, as a multiple of stock."""
    return BUDGETS[model] * (1 if WORKLOADS[workload][0] == 16 else MANY_TURNS)


def tables(result: dict[str, Any]) -> str:
    """A line for each model, with its operators as a multiple of stock."""
    lines = []
    for one in result["counted"]:
        stock = one["stock"]["operators"]
        counts = [*one["row"].values(), *one.get("waves", {}).values()]
        cells = [f"{count['operators']:,.0f} ({count['operators'] / stock:.2f} ×)" for count in counts]
        name = one["model"] + ("" if one["checkpointing"] else ", no checkpointing")
        lines.append([name, f"{stock:,.0f}", *cells, *["–"] * (len(WORKLOADS) + 1 - len(cells))])
    return table(["operators per layer", "packed N-pass", *WORKLOADS, f"{next(iter(WORKLOADS))}, waves"], lines)


def outside_the_model(turns: int = 16, repeats: int = 20) -> dict[str, float]:
    """Return the tokens of a row, and the least CPU milliseconds of each thing that happens to it before the model."""
    row = Row.from_tree(PrefixTree.from_samples(conversation(turns, VOCABULARY, turns)))
    rows = Dataset.from_list([row.columns()]).with_format("numpy")
    collate = DataCollatorForSinglePass(pad_token_id=0)
    rules = ((causal_mask_function, None), (sliding_window_causal_mask_function(128), 128))

    def plan() -> None:
        for rule, size in rules:
            varlen_plan(TreeMask(tree, rule, size), 2)

    tree = as_tree(collate([rows[0]])["tree"])
    steps: dict[str, Callable[[], object]] = {"fetch": lambda: rows[0], "collate": lambda: collate([example])}
    example = rows[0]
    return {"tokens": len(row), **{name: _least(step, repeats) for name, step in (steps | {"plan": plan}).items()}}


def _least(step: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        step()
        times.append(1e3 * (time.thread_time() - start))
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.host_time", description=__doc__.splitlines()[1])
    parser.add_argument("--tables", action="store_true", help="write the page from the counts as they are")
    parser.add_argument("--row", action="store_true", help="time what is outside the model, and write nothing")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    if arguments.row:
        print(outside_the_model())
        return
    if not arguments.tables:
        counted = [count(model, checkpointing) for model in BUDGETS for checkpointing in (True, False)]
        RESULTS.write_text(json.dumps({**describe("cpu", "host_time"), "counted": counted}, indent=1) + "\n")
    replace_between_markers(PAGE, tables(json.loads(RESULTS.read_text())), "host time")


if __name__ == "__main__":
    main()
