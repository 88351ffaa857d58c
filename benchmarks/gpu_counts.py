"""
What a GPU has to do for one training step, and what speed-up that allows, counted; writes into docs/performance.md.

    python -m benchmarks.gpu_counts            count, and write the tables into the page
    python -m benchmarks.gpu_counts --tables   the tables only, from the counts as they are

Tokens, operations and attention pairs are exact. Launches are the operators of one step with gradient checkpointing
that reach the device, on meta tensors, in bfloat16, on PyTorch's varlen kernel; the scan of flash-linear-attention
counts as one operator forward and one backward. One and two periods of a model's layers are counted; all are alike.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedConfig, logging
from transformers.models.qwen3_5 import modeling_qwen3_5

from benchmarks.kernel_speed import KernelSpeed, attention_flops
from benchmarks.launches import LaunchCounter
from benchmarks.machine import describe
from benchmarks.model_shapes import MODELS, get_config, make_model
from benchmarks.report import replace_between_markers, table
from trl_singlepass import PrefixTree, Sample
from trl_singlepass.attention import flash, registry
from trl_singlepass.attention.varlen_kernels import TorchFlash
from trl_singlepass.cost import Cost, ModelShape, npass_cost, single_pass_cost
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.reference.timing import Schedule, Sizes, conversation, make_step


RESULTS = Path(__file__).parent / "results" / "gpu_counts.json"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
AGENT = Sizes(user=(100, 600), reasoning=(100, 400), answer=(30, 100), system=2000)
CODING = Sizes(user=(300, 1000), reasoning=(100, 400), answer=(50, 150), system=3000)
WORKLOADS = {
    "chat, 16 turns": (16, Sizes()),
    "agent, 16 turns": (16, AGENT),
    "agent, 32 turns": (32, AGENT),
    "coding agent, 100 steps": (100, CODING),
}
# Shares of an H100's peak, the lower end of each. FlashAttention-3, arXiv 2407.08608: FlashAttention-2 reaches 35 %,
# matrix products 80 to 90 %, FlashAttention-3 is 1.5 to 2 times as fast as FlashAttention-2. PyTorch's post on
# FlexAttention (2024): 85 to 90 % of FlashAttention-2, on an A100. docs/performance.md lists them.
MATRICES = 0.8
ATTENTION = {"FA2": 0.35, "FA3": 0.525, "Triton": 0.2975}
VOCABULARY = 30_000


def samples_of(workload: str) -> list[Sample]:
    turns, sizes = WORKLOADS[workload]
    return conversation(turns, VOCABULARY, turns, sizes)


def count(model: str, workload: str) -> dict[str, Any]:
    """Everything that is counted of one model and workload."""
    return {"model": model, "workload": workload, **operations(model, workload), "launches": launches(model, workload)}


def operations(model: str, workload: str) -> dict[str, Any]:
    samples, shape = samples_of(workload), ModelShape.from_config(get_config(model))
    npass, single = npass_cost(samples, shape), single_pass_cost([PrefixTree.from_samples(samples)], shape)
    bounds = {name: KernelSpeed(share, MATRICES).bound(npass, single, shape) for name, share in ATTENTION.items()}
    return {
        "npass": _costs(npass, shape),
        "single_pass": _costs(single, shape),
        "flops_ratio": round(npass.flops / single.flops, 4),
        "bounds": {name: round(bound, 4) for name, bound in bounds.items()},
    }


def _costs(cost: Cost, shape: ModelShape) -> dict[str, Any]:
    share = attention_flops(cost, shape) / cost.flops
    return {"tokens": cost.tokens, "flops": cost.flops, "attention_share": round(share, 4)}


def launches(model: str, workload: str) -> dict[str, int]:
    """Operators of one step by schedule, from one and two periods of layers."""
    _, _, period = MODELS[model]
    num_periods = get_config(model).num_hidden_layers // period
    samples, counts = samples_of(workload), {}
    for schedule in (Schedule.NPASS_PACKED, Schedule.SINGLE_PASS):
        one, two = (count_step(get_config(model, layers), samples, schedule) for layers in (period, 2 * period))
        counts[schedule.value] = one + (num_periods - 1) * (two - one)
    return counts


def count_step(config: PreTrainedConfig, samples: Sequence[Sample], schedule: Schedule) -> int:
    """Operators of one step on meta tensors."""
    with on_meta_tensors():
        model = make_model(config, "torch_varlen", "meta")
        enable_tree(model)
        step = make_step(model, samples, schedule)
        step()  # what is made once per row or process
        with LaunchCounter() as counter:
            step()
    return counter.total


@contextmanager
def on_meta_tensors() -> Iterator[None]:
    """Choose what a GPU would run: PyTorch's varlen kernel, and the scan of flash-linear-attention as one operator."""
    with ExitStack() as stack:
        for module in (registry, flash):
            stack.enter_context(patch.object(module, "flash_kernel", lambda name: TorchFlash()))
        stack.enter_context(patch.object(modeling_qwen3_5, "torch_chunk_gated_delta_rule", scan))
        # Whether a padding mask is all ones cannot be asked of meta tensors.
        stack.enter_context(patch("transformers.masking_utils.is_tracing", lambda *args: True))
        yield


class Scan(torch.autograd.Function):
    """The shapes of a gated delta rule; the clones count as its two operators."""

    @staticmethod
    def forward(
        ctx: Any, num_sequences: int, query: torch.Tensor, value: torch.Tensor, *others: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(query, value, *others)
        state = (num_sequences, value.shape[2], query.shape[-1], value.shape[-1])
        return value.clone(), value.new_empty(state, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, *others = ctx.saved_tensors
        return None, query.clone(), *(None if x is None else torch.empty_like(x) for x in others)


def scan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    num_sequences = len(query) if cu_seqlens is None else len(cu_seqlens) - 1
    out, state = Scan.apply(num_sequences, query, value, key, g, beta, initial_state)
    return out, state if output_final_state else None


def tables(result: dict[str, Any]) -> str:
    """Two tables with a row for each conversation: bounds of the speed-up, and launches, of every model."""
    counted = {(one["model"], one["workload"]): one for one in result["counted"]}
    bounds, launched = [], []
    for workload in WORKLOADS:
        ones = [counted[model, workload] for model in MODELS]
        tokens = [f"{ones[0][schedule]['tokens']:,}" for schedule in ("npass", "single_pass")]
        ranges = [f"{min(one['bounds'].values()):.2f}–{max(one['bounds'].values()):.2f}" for one in ones]
        bounds.append([workload, *tokens, *ranges])
        launched.append(
            [workload, *(" / ".join(f"{number:,}" for number in one["launches"].values()) for one in ones)]
        )
    return "\n\n".join(
        [
            table(["bound", "tokens, N-pass", "tokens, row", *MODELS], bounds),
            table(["launches, N-pass / row", *MODELS], launched),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_counts", description=__doc__.splitlines()[1])
    parser.add_argument("--tables", action="store_true", help="write the page from the counts as they are")
    logging.set_verbosity_error()
    if not parser.parse_args().tables:
        counted = []
        for model in MODELS:
            for workload in WORKLOADS:
                counted.append(count(model, workload))
                print(json.dumps(counted[-1]), flush=True)
        result = {**describe("cpu", "gpu_counts"), "matrices": MATRICES, "attention": ATTENTION, "counted": counted}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    replace_between_markers(PAGE, tables(json.loads(RESULTS.read_text())), "gpu counts")


if __name__ == "__main__":
    main()
