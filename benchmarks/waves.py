"""
Measure time and peak memory of one training step on one conversation: in waves, in one row, and sample by sample.

    python -m benchmarks.waves                         8, 16 and 32 turns
    python -m benchmarks.waves --checkpointing         the same with gradient checkpointing
    python -m benchmarks.waves --long                  64 turns and one turn of 64k tokens in waves of 2048

Each measurement runs in its own process, and modes alternate. Time is the CPU time of one thread, in the second step;
memory is the peak of the process above what it held before, in the first step.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, set_seed

from benchmarks.machine import describe
from benchmarks.modes import MODES, Step
from benchmarks.step_time import KEPT_MEMORY, MODEL, TINY_MODEL, TINY_SIZES, now
from trl_singlepass import PrefixTree
from trl_singlepass.cost import ModelShape, npass_cost, single_pass_cost
from trl_singlepass.cost.memory import ActivationBytes
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.engine.model_call import as_tree
from trl_singlepass.engine.waves import WavePlan, WaveRunner, select
from trl_singlepass.reference.timing import Sizes, conversation, peak, reset_peak, wave_tokens_that_keep_the_history
from trl_singlepass.trees.rows import Row, TreePlan


RESULTS = Path(__file__).parent / "results"
NAMES = ("input_ids", "position_ids", "attention_mask")


@dataclass(frozen=True)
class Case:
    """One measurement, with plain fields only, so that it can be passed to its own process as JSON."""

    mode: str
    turns: int
    wave_tokens: int = 0
    one_turn_tokens: int = 0
    checkpointing: bool = False
    tiny: bool = False

    @property
    def model(self) -> dict[str, Any]:
        return TINY_MODEL if self.tiny else MODEL

    def samples(self) -> list[Any]:
        sizes = TINY_SIZES if self.tiny else Sizes()
        if self.one_turn_tokens:
            sizes = Sizes((50, 50), (self.one_turn_tokens - 250,) * 2, (150, 150), 50)
        return conversation(self.turns, self.model["vocab_size"], 0, sizes)

    def plan(self, row: TreePlan) -> WavePlan:
        """Return waves of the given size; by default, the smallest that keeps the history next to any branch."""
        if self.wave_tokens:
            return WavePlan.from_tree_plan(row, self.wave_tokens)
        return WavePlan.from_tree_plan(row, wave_tokens_that_keep_the_history(row))


def waves(step: Step, case: Case) -> tuple[Callable[[], float], dict[str, Any]]:
    """The samples' prefix tree in waves, with counts that the step fills in."""
    enable_tree(step.model)
    batch = DataCollatorForSinglePass(pad_token_id=0)([Row.from_tree(PrefixTree.from_samples(step.samples)).columns()])
    tree = as_tree(batch["tree"])
    plan, labels = case.plan(batch["tree"].plan), batch["labels"][0]
    facts: dict[str, Any] = {"schedule": str(plan), "peak_tokens": plan.peak_tokens}

    def decoder(wave: Any, tokens: Any) -> torch.Tensor:
        return step.decoder(**{name: select(batch[name], tokens) for name in NAMES})

    def loss() -> float:
        row, total = WaveRunner(plan, tree), 0.0
        for wave, hidden in row.train(decoder, decoder):
            targets = torch.cat([labels[wave.start + 1 : wave.end + 1], labels[:1]])[: len(wave)]
            predicting = (targets != -100).nonzero()[:, 0]
            total += step.backward(hidden[0, predicting], targets[predicting])
        facts["key_value_bytes"] = row.peak_cache_bytes
        facts["key_value_tokens"] = plan.cached_tokens
        return total

    return loss, facts


def measure(case: Case) -> dict[str, Any]:
    """Run two steps in this process: peak memory is that of the first, time that of the second."""
    torch.set_num_threads(1)
    set_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**case.model), dtype=torch.float32).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    warm_up = conversation(2, case.model["vocab_size"], 1, TINY_SIZES)
    MODES["single_pass"](Step(model, warm_up))()
    model.zero_grad(set_to_none=False)  # gradients exist before the step, as from the second batch on
    model.set_attn_implementation("sdpa")
    step, facts = Step(model, case.samples()), {}
    if case.mode == "waves":
        loss, facts = waves(step, case)
    else:
        loss = MODES[case.mode](step)
    before = reset_peak()
    loss()
    used = peak() - before
    model.zero_grad(set_to_none=False)
    start = now()
    value = loss()
    seconds = now() - start
    norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm()
    return {**vars(case), "seconds": seconds, "bytes": used, "loss": value, "norm": float(norm), **facts}


def measure_apart(case: Case) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.waves", "--case", json.dumps(vars(case))]
    environment = {**os.environ, **KEPT_MEMORY}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{case} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{case.turns:3} turns  {case.mode:17} {result['seconds']:8.2f} s {result['bytes'] / 2**20:8.0f} MiB"
        f"  {result.get('schedule', '')}",
        flush=True,
    )
    return result


def counted(case: Case) -> dict[str, Any]:
    """Return the counted cost of N-pass and of the tree, and the bytes of activations per token."""
    samples, config = case.samples(), Qwen3Config(**case.model)
    tree, shape = PrefixTree.from_samples(samples), ModelShape.from_config(config)
    npass, single = npass_cost(samples, shape), single_pass_cost([tree], shape)
    count = ActivationBytes.from_config(config, 4, checkpointing=case.checkpointing)
    return {
        "turns": case.turns,
        "npass_tokens": npass.tokens,
        "longest_sample": max(len(sample) for sample in samples),
        "tree_tokens": single.tokens,
        "predicted_speedup": npass.flops / single.flops,
        "activation_bytes_per_token": count.per_token,
        "key_value_bytes_per_token": count.key_value,
    }


def cases(args: argparse.Namespace) -> list[Case]:
    if args.long:
        size = 64 if args.tiny else 2048
        one_turn = args.one_turn or (2_000 if args.tiny else 65_536)
        common = {"mode": "waves", "wave_tokens": size, "tiny": args.tiny}
        return [Case(turns=8, **common), Case(turns=64, **common), Case(turns=1, one_turn_tokens=one_turn, **common)]
    common = {"checkpointing": args.checkpointing, "tiny": args.tiny}
    modes = ("npass_sequential", "single_pass", "waves")
    return [Case(mode, turns, **common) for turns in args.turns for mode in modes]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.waves", description=__doc__.splitlines()[1])
    parser.add_argument("--turns", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing inside each wave")
    parser.add_argument("--long", action="store_true", help="64 turns, and one turn of 64k tokens")
    parser.add_argument("--one-turn", type=int, help="tokens of the one long turn")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try out the script")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(Case(**json.loads(args.case)))))
        return
    chosen = cases(args)
    result = {
        **describe("cpu", "waves_long" if args.long else "waves"),
        "model": chosen[0].model,
        "dtype": "float32",
        "counted": [counted(case) for case in dict.fromkeys(replace(c, mode="", wave_tokens=0) for c in chosen)],
        "measured": [measure_apart(case) for _ in range(args.repeats) for case in chosen],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{result['kind']}{'_checkpointing' if args.checkpointing else ''}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
