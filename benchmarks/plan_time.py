"""
Time the planning of a row on the host, and its forward pass on one CPU core.

    python -m benchmarks.plan_time

Rows have 8k to 64k tokens and 64 trees. Planning is everything that a step does besides the model: the collator's
plan, the block mask of FlexAttention (full and sliding), and the calls of a varlen kernel. The model is deliberately
small (2 layers of width 256); with a larger one, the share of planning is smaller. Writes
benchmarks/results/plan_time.json.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.machine import describe
from trl_singlepass.attention.block_mask import build_block_mask
from trl_singlepass.attention.context import Tree, running_on
from trl_singlepass.attention.tree_mask import TreeMask
from trl_singlepass.attention.varlen_plan import varlen_plan
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row, TreePlan
from trl_singlepass.trees.sample import Sample


RESULTS = Path(__file__).parent / "results" / "plan_time.json"
TREES, TURNS, WINDOW = 64, 6, 512


def row_of(num_tokens, seed=0):
    """Return rows of 64 chats without reasoning in the history, about `num_tokens` long in total."""
    generator = np.random.default_rng(seed)
    unit = num_tokens / TREES / TURNS / 8  # a turn is 1 question + 1 answer + a branch of 5 + 1
    return [Row.from_tree(PrefixTree.from_samples(chat(generator, unit))) for _ in range(TREES)]


def chat(generator, unit):
    history, samples = [], []
    for turn in range(TURNS):
        question, reasoning, answer = (generator.integers(5, 1000, round(unit * k)).tolist() for k in (1, 5, 1))
        history += question
        samples.append(Sample.from_prompt_and_completion(history, reasoning + answer, 2 * turn + 1))
        history += answer
    return samples


def best(function, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def planning(rows, repeats):
    """Return the seconds of each part of planning."""
    plan = TreePlan.from_rows(rows)
    end, depth = torch.from_numpy(Row.join(rows).subtree_end)[None], torch.from_numpy(plan.depths())[None]
    full, sliding = (
        transformers.masking_utils.causal_mask_function,
        transformers.masking_utils.sliding_window_causal_mask_function(WINDOW),
    )

    def mask(function, size=None):
        return TreeMask(Tree(plan, end, depth), function, size)

    return {
        "plan": best(lambda: TreePlan.from_rows(rows), repeats),
        "block_mask_full": best(lambda: build_block_mask(mask(full), (128, 128)), repeats),
        "block_mask_sliding": best(lambda: build_block_mask(mask(sliding, WINDOW), (128, 128)), repeats),
        "varlen_full": best(lambda: varlen_plan(mask(full)), repeats),
        "varlen_sliding": best(lambda: varlen_plan(mask(sliding, WINDOW)), repeats),
    }


def forward_time(rows, repeats):
    """Return the seconds of a forward pass of the row, without the LM head."""
    config = transformers.Qwen3Config(
        vocab_size=1000, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=65536,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval()
    enable_tree(model)
    plan, row = TreePlan.from_rows(rows), Row.join(rows)
    inputs = {
        "input_ids": torch.from_numpy(row.input_ids)[None],
        "position_ids": torch.from_numpy(plan.depths())[None],
        "attention_mask": torch.from_numpy(row.multiplicity)[None],
    }

    def forward():
        with torch.no_grad(), running_on(Tree(plan, torch.from_numpy(row.subtree_end)[None], inputs["position_ids"])):
            model.model(**inputs, use_cache=False)

    return best(forward, repeats)


def measure(num_tokens, repeats=20, forwards=1):
    rows = row_of(num_tokens)
    parts, forward = planning(rows, repeats), forward_time(rows, forwards)
    shares = {name: parts[name] / forward for name in parts}
    # What a step with one backend and two types of mask plans.
    flex = sum(shares[name] for name in ("plan", "block_mask_full", "block_mask_sliding"))
    varlen = sum(shares[name] for name in ("plan", "varlen_full", "varlen_sliding"))
    return {
        "tokens": sum(map(len, rows)),
        "trees": len(rows),
        "runs": len(TreePlan.from_rows(rows).runs),
        "seconds": parts,
        "forward_seconds": forward,
        "share_flex": flex,
        "share_varlen": varlen,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for num_tokens in arguments.tokens:
        results.append(measure(num_tokens))
        row = results[-1]
        times = "  ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in row["seconds"].items())
        shares = f"share of forward: flex {row['share_flex']:.2%}, varlen {row['share_varlen']:.2%}"
        print(f"{row['tokens']} tokens: {times}  forward {row['forward_seconds']:.2f} s  {shares}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**describe("cpu", "plan_time"), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
