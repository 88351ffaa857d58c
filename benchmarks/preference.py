"""
Measure DPO on trajectories of several turns: a single pass next to stock DPO and to separate passes for each turn.

    python -m benchmarks.preference                     counted operations and time of a step
    python -m benchmarks.preference --data FILE...      also what stock DPO leaves out and adds on your conversations

A step is a forward and backward pass of the policy and a forward pass of the reference, for one pair. Separate passes
run one after the other. Time is the CPU time of one thread, on a CPU. Modes alternate, and a speed-up is the median of
the ratios within a round, since the load of a shared machine changes between rounds. Separate passes of several turns
take longest by far and run in the first round only.

With `--data`, each conversation becomes a pair: its answers are preferred to those of the next one in the file, which
stand in their places. The first step's gradient is that of a small Qwen3 with random weights.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, set_seed
from trl.trainer.utils import add_fused_lm_head

from benchmarks.machine import describe
from trl_singlepass import PrefixTree, Sample
from trl_singlepass.cost import ModelShape, npass_cost, single_pass_cost
from trl_singlepass.data.arrow import to_columns
from trl_singlepass.data.pairs import SIDES, Pair, example_to_pair
from trl_singlepass.data.selection import OverlongTurns, fit_samples
from trl_singlepass.data.settings import PairSettings
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.preference.collator import DataCollatorForSinglePassPreference


RESULTS = Path(__file__).parent / "results" / "preference.json"
BETA = 0.1
PROMPTS, TURNS = (500, 4000), (1, 8)
REASONING, ANSWER, USER = 150, 50, 50  # tokens of each turn
SIZES = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4}
MODEL = {**SIZES, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4000, "max_position_embeddings": 65_536}
TINY = {**MODEL, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 100}
LogProbs = Callable[[PreTrainedModel, Pair], torch.Tensor]
"""From a model and a pair to the log-probabilities of its two trajectories."""


def make_pair(prompt_tokens: int, turns: int, vocab_size: int, seed: int = 0) -> Pair:
    """Return a pair of random tokens whose contexts hold no earlier reasoning."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(vocab_size, size=prompt_tokens)
    return Pair(*(fit(list(trajectory(prompt, turns, vocab_size, rng))) for _ in range(2)), num_shared_turns=0)


def fit(samples: Sequence[Sample]) -> Any:
    return fit_samples(samples, None, OverlongTurns.TRUNCATE)


def trajectory(prompt: Any, turns: int, vocab_size: int, rng: np.random.Generator) -> Iterable[Sample]:
    for _ in range(turns):
        reasoning, answer, user = (rng.integers(vocab_size, size=size) for size in (REASONING, ANSWER, USER))
        yield Sample.from_prompt_and_completion(prompt, np.concatenate([reasoning, answer]))
        prompt = np.concatenate([prompt, answer, user])


def as_stock_renders(pair: Pair) -> list[Sample]:
    """Return each trajectory as one sequence: the last turn's, of which everything behind the prompt counts."""
    start = min(sample.prompt_length for sample in pair.samples)
    last = [side.samples[-1].token_ids for side in pair.sides]
    return [Sample.from_prompt_and_completion(ids[:start], ids[start:]) for ids in last]


# Three ways to the log-probabilities of a pair -----------------------------------------------------------------------


def columns_of(pair: Pair) -> dict[str, Any]:
    """Return a pair as a row of a dataset."""
    return {name: values[0] for name, values in to_columns([pair.to_row()], SIDES, has_images=False).items()}


def single_pass(model: PreTrainedModel, pair: Pair) -> torch.Tensor:
    batch = DataCollatorForSinglePassPreference(pad_token_id=0)([columns_of(pair)])
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    log_probs: torch.Tensor = model(**batch, labels=labels, fused_lm_head=True).log_probs
    return log_probs.sum(1)


def npass(model: PreTrainedModel, pair: Pair) -> torch.Tensor:
    return torch.stack([torch.stack([run(model, [turn])[0] for turn in side.samples]).sum() for side in pair.sides])


def stock(model: PreTrainedModel, pair: Pair) -> torch.Tensor:
    return run(model, as_stock_renders(pair))


def run(model: PreTrainedModel, samples: Sequence[Sample]) -> torch.Tensor:
    """Log-probabilities of completions, from one forward pass on a padded batch."""
    ids = [torch.tensor(sample.token_ids) for sample in samples]
    labels = [torch.where(torch.arange(len(i)) < s.prompt_length, -100, i) for i, s in zip(ids, samples, strict=True)]
    mask = None if len(ids) == 1 else pad_sequence([torch.ones_like(line) for line in ids], batch_first=True)
    outputs = model(
        input_ids=pad_sequence(ids, batch_first=True),
        attention_mask=mask,
        labels=pad_sequence(labels, batch_first=True, padding_value=-100),
        fused_lm_head=True,
    )
    log_probs: torch.Tensor = outputs.log_probs.sum(1)
    return log_probs


MODES: dict[str, LogProbs] = {"single_pass": single_pass, "npass": npass, "stock": stock}


def make_model(tree: bool, sizes: dict[str, Any]) -> PreTrainedModel:
    set_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes), dtype=torch.float32, attn_implementation="sdpa")
    add_fused_lm_head(model)
    if tree:
        enable_tree(model)
    return model


def loss_of(mode: str, model: PreTrainedModel, reference: PreTrainedModel, pair: Pair) -> torch.Tensor:
    with torch.no_grad():
        expected = MODES[mode](reference, pair)
    chosen, rejected = MODES[mode](model, pair) - expected
    return -F.logsigmoid(BETA * (chosen - rejected))


# Speed ---------------------------------------------------------------------------------------------------------------


def count(pair: Pair, sizes: dict[str, Any]) -> dict[str, int]:
    """Operations of a training pass in each mode; the reference adds a third of it in all of them."""
    shape = ModelShape.from_config(Qwen3Config(**sizes))
    return {
        "single_pass": single_pass_cost([PrefixTree.from_samples(pair.samples)], shape).flops,
        "npass": npass_cost(pair.samples, shape).flops,
        "stock": npass_cost(as_stock_renders(pair), shape).flops,
    }


def measure_speed(sizes: dict[str, Any], prompts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    models = {mode: [make_model(mode == "single_pass", sizes) for _ in range(2)] for mode in MODES}
    warm_up = make_pair(50, 2, sizes["vocab_size"])
    for mode, (model, reference) in models.items():
        loss_of(mode, model, reference, warm_up).backward()
    rows = []
    for prompt in prompts:
        for turns in TURNS:
            pair = make_pair(prompt, turns, sizes["vocab_size"])
            seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
            for number in range(repeats):
                for mode, (model, reference) in models.items():
                    if mode == "npass" and turns > 1 and number > 0:
                        continue
                    start = time.process_time()
                    loss_of(mode, model, reference, pair).backward()
                    model.zero_grad()
                    seconds[mode].append(time.process_time() - start)
            rows.append({"prompt": prompt, "turns": turns, "flops": count(pair, sizes), "seconds": seconds})
            print(json.dumps(rows[-1]), flush=True)
    return rows


# What stock DPO computes instead -------------------------------------------------------------------------------------


def as_pairs(conversations: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Make a pair of each conversation: its own answers, and the next one's in their places; tool calls stay."""
    for conversation, other in pairwise(conversations):
        messages, answers = conversation["messages"], list(filter(is_answer, other["messages"]))
        first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
        if first is None or not answers:
            continue
        places = itertools.count()
        rejected = [answers[next(places) % len(answers)] if is_answer(m) else m for m in messages[first:]]
        shared = {name: conversation[name] for name in ("tools",) if conversation.get(name)}
        yield {"prompt": messages[:first], "chosen": messages[first:], "rejected": rejected, **shared}


def is_answer(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and not message.get("tool_calls")


def compare_with_stock(
    path: str, tokenizer: Any, num_conversations: int, num_pairs: int, max_tokens: int
) -> dict[str, Any]:
    lines = Path(path).read_text("utf-8").splitlines()[:num_conversations]
    conversations = [json.loads(line) for line in lines]
    examples = list(as_pairs(conversations))
    pairs = [example_to_pair(example, i, tokenizer, PairSettings()) for i, example in enumerate(examples)]
    several = [pair for pair in pairs if len(pair.chosen.samples) > 1]
    own = sum(len(s) - s.prompt_length for pair in several for s in pair.samples)
    counted = [len(s) - s.prompt_length for pair in several for s in as_stock_renders(pair)]
    kept = sum(map(tokens_in_both, several))
    short = [pair for pair in several if sum(map(len, pair.samples)) <= max_tokens][:num_pairs]
    return {
        "data": Path(path).name,
        "pairs": len(several),
        "turns": sum(len(pair.samples) for pair in several) / len(several) / 2,
        "share_of_stock_tokens_not_generated": 1 - kept / sum(counted),
        "share_of_generated_tokens_not_in_stock": 1 - kept / own,
        "gradient_error": gradient_error(short, len(tokenizer)),
        "gradient_pairs": len(short),
    }


def tokens_in_both(pair: Pair) -> int:
    """Generated tokens that stand in the one sequence too, under a template that strips earlier reasoning."""
    last = {id(side.samples[-1]) for side in pair.sides}
    return sum(len(s) - s.prompt_length - (0 if id(s) in last else s.reasoning_length) for s in pair.samples)


def gradient_error(pairs: Sequence[Pair], vocab_size: int) -> float:
    """Norm of the difference of the first step's gradients, relative to that of the served contexts."""
    gradients = []
    for mode in ("single_pass", "stock"):
        model, reference = (make_model(mode == "single_pass", {**TINY, "vocab_size": vocab_size}) for _ in range(2))
        for pair in pairs:
            (loss_of(mode, model, reference, pair) / len(pairs)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    ours, theirs = gradients
    return float((theirs - ours).norm() / ours.norm())


# Tables of docs/preference.md ----------------------------------------------------------------------------------------


def speed_up(row: dict[str, Any], other: str) -> float:
    """Return the median of the ratios of times within a round."""
    rounds = zip(row["seconds"][other], row["seconds"]["single_pass"], strict=False)
    return statistics.median(theirs / ours for theirs, ours in rounds)


def speed_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return lines of Markdown: measured speed-up and that of counted operations, over both others."""
    lines = ["| prompt | turns | over separate passes | counted | over stock DPO | counted |", "|---:|" + "---:|" * 5]
    for row in rows:
        cells = [f"{row['prompt']:,}", str(row["turns"])]
        for other in ("npass", "stock"):
            counted = row["flops"][other] / row["flops"]["single_pass"]
            cells += [f"{speed_up(row, other):.2f}", f"{counted:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def stock_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return lines of Markdown: what stock DPO counts and leaves out, and how far its gradient is off."""
    lines = [
        "| data | pairs | turns | not generated | not counted | gradient off by |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        shares = [row["share_of_stock_tokens_not_generated"], row["share_of_generated_tokens_not_in_stock"]]
        cells = [row["data"].removesuffix(".jsonl"), str(row["pairs"]), f"{row['turns']:.1f}"]
        cells += [f"{value:.0%}" for value in (*shares, row["gradient_error"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--tokenizer")
    parser.add_argument("--conversations", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=4, help="pairs whose gradient is compared")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--prompts", type=int, nargs="+", default=list(PROMPTS), help="lengths of prompts, in tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    sizes, prompts = (TINY, [50]) if options.tiny else (MODEL, options.prompts)
    result = describe("cpu", "preference")
    result["speed"] = {"model": sizes, "rows": measure_speed(sizes, prompts, options.repeats)}
    if options.data:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        result["stock"] = {
            "rows": [
                compare_with_stock(path, tokenizer, options.conversations, options.pairs, max_tokens=8000)
                for path in options.data
            ]
        }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
