"""
Take one conversation in the shape of a coding agent, of up to a million tokens, through everything before the model.

    python -m benchmarks.long_conversation --tokenizer Qwen/Qwen3-0.6B     preparation, packing, plan and waves
    python -m benchmarks.long_conversation --tokenizer Qwen/Qwen3-0.6B --steps     one training step of a tiny model

Each case runs in its own process. Time is the CPU time of one thread; memory is the peak of the process above what it
held before. Writes benchmarks/results/long_conversation.json and long_conversation_steps.json.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, set_seed

from benchmarks.machine import describe
from benchmarks.preparation import text
from trl_singlepass.cost import ModelShape
from trl_singlepass.cost.memory import ActivationBytes
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.data.conversations import example_to_rows
from trl_singlepass.data.packing import pack_rows
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.engine.model_call import as_tree
from trl_singlepass.engine.wave_plan import WavePlan
from trl_singlepass.engine.waves import WaveRunner, select
from trl_singlepass.reference.timing import peak, reset_peak
from trl_singlepass.rendering.prefixes import Prefixes
from trl_singlepass.trees.rows import Row, TreePlan


RESULTS = Path(__file__).parent / "results"
WAVE_TOKENS = 4096
VOCABULARY = 1000
# One layer of one head: attention to a history of so many tokens is what takes time.
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2**21,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 1024, "layer_types": ["sliding_attention"]}


@dataclass(frozen=True)
class Case:
    """One measurement, with plain fields only, so that it can be passed to its own process as JSON."""

    tokenizer: str
    turns: int
    tokens: int
    step: bool = False
    window: bool = False
    wave_tokens: int = WAVE_TOKENS


def agent(turns: int, result_words: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return the messages of a coding agent: short reasoning, a call, a long result; a new request every 20 turns."""
    source = random.Random(seed)
    messages: list[dict[str, Any]] = [{"role": "system", "content": text(source, 300, 400)}]
    for turn in range(turns):
        if turn % 20 == 0:
            messages.append({"role": "user", "content": text(source, 30, 60)})
        function = {"name": "read_file", "arguments": {"path": f"src/file_{turn}.py", "start": turn}}
        call = {"tool_calls": [{"type": "function", "function": function}]}
        messages.append({"role": "assistant", "reasoning_content": text(source, 30, 60), "content": "", **call})
        messages.append({"role": "tool", "content": text(source, 9 * result_words // 10, 11 * result_words // 10)})
    return messages


def of_size(case: Case, tokenizer: Any) -> list[dict[str, Any]]:
    """Return a conversation whose tree has about as many tokens as wanted."""

    def size(turns: int, words: int) -> int:
        return len(example_to_rows({"messages": agent(turns, words)}, 0, tokenizer, RowSettings())[0].row)

    # Each request of the user adds its turns to the history once more, without their reasoning.
    words, wanted = 100, case.tokens / case.turns
    fixed = (size(60, 1) - size(40, 1)) / 20
    per_word = ((size(60, words + 1) - size(40, words + 1)) / 20 - fixed) / words
    return agent(case.turns, max(round((wanted - fixed) / per_word), 1))


class Stopwatch:
    """CPU seconds, and the memory that was added at most since it was made."""

    def __init__(self) -> None:
        self._before, self._start = reset_peak(), time.process_time()

    def facts(self, name: str) -> dict[str, float]:
        return {f"{name}_seconds": time.process_time() - self._start, f"{name}_bytes": peak() - self._before}


def time_templates(spent: list[float]) -> None:
    """Add the seconds that chat templates run to a list."""
    rendered = Prefixes._rendered

    def timed(*args: Any, **kwargs: Any) -> str:
        start = time.process_time()
        try:
            return rendered(*args, **kwargs)
        finally:
            spent.append(time.process_time() - start)

    Prefixes._rendered = timed  # type: ignore[method-assign]


def plan_waves(row: Row, wave_tokens: int) -> int:
    """Plan a row and every forward of its waves, and return the number of waves."""
    batch = DataCollatorForSinglePass(pad_token_id=0)([row.columns()])
    tree = as_tree(batch["tree"])
    plan = WavePlan.from_tree_plan(batch["tree"].plan, wave_tokens)
    runner = WaveRunner(plan, tree, offload=True)
    for _ in runner.train(lambda wave, tokens: None, lambda wave, tokens: None):
        pass
    return len(plan.waves)


def measure_preparation(case: Case) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(case.tokenizer)
    messages, templates = of_size(case, tokenizer), []
    short = [
        example_to_rows({"messages": agent(2, 50, seed)}, 0, tokenizer, RowSettings())[0].row for seed in range(64)
    ]
    time_templates(templates)
    watch = Stopwatch()
    (prepared,) = example_to_rows({"messages": messages}, 0, tokenizer, RowSettings())
    row = prepared.row
    facts: dict[str, Any] = {"tree_tokens": len(row), "sample_tokens": prepared.counts["num_sample_tokens"]}
    facts |= {**watch.facts("preparation"), "template_seconds": sum(templates)}
    watch = Stopwatch()
    facts["packed_rows"] = len(pack_rows([*short, row], len(row) + 4096))
    facts |= watch.facts("packing")
    watch = Stopwatch()
    facts["waves"] = plan_waves(row, case.wave_tokens)
    return {**facts, **watch.facts("plan")}


def measure_step(case: Case) -> dict[str, Any]:
    """Run one training step in waves, with keys and values on the CPU."""
    tokenizer = AutoTokenizer.from_pretrained(case.tokenizer)
    row = example_to_rows({"messages": of_size(case, tokenizer)}, 0, tokenizer, RowSettings())[0].row
    set_seed(0)
    config = Qwen3Config(**MODEL, **(WINDOW if case.window else {}))
    model = Qwen3ForCausalLM(config).train()
    enable_tree(model)
    batch = DataCollatorForSinglePass(pad_token_id=0)([row.columns()])
    batch["input_ids"] %= VOCABULARY
    labels = batch["labels"][0]
    labels[labels != -100] %= VOCABULARY
    watch = Stopwatch()
    tree = as_tree(batch["tree"])
    plan = WavePlan.from_tree_plan(batch["tree"].plan, case.wave_tokens)
    runner = WaveRunner(plan, tree, offload=True)

    def decoder(wave: Any, tokens: Any) -> torch.Tensor:
        inputs = {name: select(batch[name], tokens) for name in ("input_ids", "position_ids", "attention_mask")}
        hidden: torch.Tensor = model.model(**inputs, use_cache=False).last_hidden_state
        return hidden

    total = 0.0
    for wave, hidden in runner.train(decoder, decoder):
        targets = torch.cat([labels[wave.start + 1 : wave.end + 1], labels[:1]])[: len(wave)]
        trained = targets != -100
        # A wave without targets still hands gradients of its keys and values back.
        loss = F.cross_entropy(model.lm_head(hidden[0, trained]), targets[trained], reduction="sum") + 0 * hidden.sum()
        loss.backward()
        total += float(loss.detach())
    counted, cost = ActivationBytes.from_config(config, 4, checkpointing=False), shape_cost(row, config)
    return {
        "tree_tokens": len(row),
        **watch.facts("step"),
        "loss": total / int((labels != -100).sum()),
        "schedule": str(plan),
        "waves": len(plan.waves),
        "activation_bytes": counted.per_token * plan.peak_tokens,
        "key_value_bytes": 2 * counted.key_value * plan.cached_tokens,
        "measured_key_value_bytes": runner.peak_cache_bytes,
        "flops": cost,
    }


def shape_cost(row: Row, config: Qwen3Config) -> float:
    """Return the operations of one step on a row, as `trl_singlepass.cost` counts them."""
    plan = TreePlan.from_subtree_end(row.subtree_end)
    depths = torch.from_numpy(plan.depths())
    shape = ModelShape.from_config(config)
    pairs = sum(
        int((depths + 1 if window is None else (depths + 1).clamp(max=window)).sum()) for window in shape.windows
    )
    targets = int((row.token_parts > 0).sum())
    forward = 2 * shape.matrix_parameters * len(row) + 4 * shape.attention_width * pairs
    return 3.0 * (forward + 2 * config.hidden_size * config.vocab_size * targets)


def measure_apart(case: Case) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.long_conversation", "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{case} failed:\n{done.stderr[-2000:]}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(facts, indent=1), flush=True)
    return facts


def cases(arguments: argparse.Namespace) -> list[Case]:
    name = arguments.tokenizer
    if arguments.steps:
        whole = [Case(name, arguments.turns, tokens, step=True) for tokens in arguments.step_tokens]
        return [*whole, *(Case(name, arguments.turns, tokens, True, True) for tokens in arguments.window_tokens)]
    by_size = [Case(name, arguments.turns, tokens) for tokens in arguments.tokens]
    return [*by_size, *(Case(name, turns, turns * arguments.tokens_per_turn) for turns in arguments.by_turns)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="Qwen/Qwen3-0.6B", help="path or Hub id of a tokenizer")
    parser.add_argument("--steps", action="store_true", help="train one step instead")
    parser.add_argument("--turns", type=int, default=400)
    parser.add_argument("--tokens", type=int, nargs="*", default=[2**k for k in range(16, 21)])
    parser.add_argument("--by-turns", type=int, nargs="*", default=[50, 100, 200, 400, 1000])
    parser.add_argument("--tokens-per-turn", type=int, default=1000)
    parser.add_argument("--step-tokens", type=int, nargs="*", default=[2**k for k in range(15, 18)])
    parser.add_argument("--window-tokens", type=int, nargs="*", default=[2**k for k in (16, 18, 20)])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        torch.set_num_threads(1)
        case = Case(**json.loads(arguments.case))
        print(json.dumps({**asdict(case), **(measure_step(case) if case.step else measure_preparation(case))}))
        return
    kind = "long_conversation_steps" if arguments.steps else "long_conversation"
    result = {**describe("cpu", kind), "wave_tokens": WAVE_TOKENS}
    result |= {"model": MODEL, "window": WINDOW} if arguments.steps else {}
    result["results"] = [
        {name: value for name, value in measure_apart(case).items() if name != "tokenizer"}
        for case in cases(arguments)
    ]
    (arguments.output / f"{kind}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
