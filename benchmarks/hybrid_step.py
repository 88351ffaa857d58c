"""
Time one training step of a small hybrid (Qwen3.5 architecture, random weights) on CPU: a single pass and N-pass.

    python -m benchmarks.hybrid_step

A recurrent layer runs on a row in one of three ways: by row kernels, in one call for all branches; by pieces, in a
call for each group of branches, which start from states at forks; over whole paths, each branch with its history.

Times are CPU seconds of one thread, the smallest of several rounds in which the modes alternate, so a busy machine
does not change them much. N-pass runs sample by sample, and as one padded batch.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, logging

from benchmarks.machine import describe
from trl_singlepass import PrefixTree, Sample
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.engine.model_call import row_context
from trl_singlepass.recurrent.measurement import path_dependent_layers
from trl_singlepass.recurrent.schedule import ReplayMode
from trl_singlepass.reference.timing import Sizes, conversation
from trl_singlepass.trees.rows import Row


RESULTS = Path(__file__).parent / "results" / "hybrid_step.json"
WAYS = ("row_kernels", "pieces", "whole_paths")
VOCABULARY = 1000
SIZES = Sizes(user=(20, 40), reasoning=(100, 300), answer=(40, 80), system=20)


def small_hybrid() -> Any:
    """Build a model with three gated delta rule layers per attention layer, as in the released models."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
    )
    return Qwen3_5ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32).train()


def sample_by_sample(model: Any, samples: list[Sample]) -> float:
    total, num_targets = 0.0, sum(len(sample) - sample.prompt_length for sample in samples)
    for sample in samples:
        tokens = torch.from_numpy(sample.token_ids.copy())
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, sample.prompt_length - 1 : -1]
        loss = F.cross_entropy(logits, tokens[sample.prompt_length :], reduction="sum") / num_targets
        loss.backward()
        total += float(loss.detach())
    return total


def padded_batch(model: Any, samples: list[Sample]) -> float:
    tokens = [torch.from_numpy(sample.token_ids.copy()) for sample in samples]
    labels = [
        torch.where(torch.arange(len(ids)) < sample.prompt_length, -100, ids)
        for ids, sample in zip(tokens, samples, strict=True)
    ]
    mask = pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True)
    inputs = pad_sequence(tokens, batch_first=True)
    logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = pad_sequence(labels, batch_first=True, padding_value=-100)[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    return float(loss.detach())


def single_pass(model: Any, samples: list[Sample]) -> float:
    row = Row.from_tree(PrefixTree.from_samples(samples)).columns()
    batch = DataCollatorForSinglePass(pad_token_id=0)([row])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    with row_context(batch["tree"]):
        logits = model(**inputs, use_cache=False).logits[0, :-1]
    loss = F.cross_entropy(logits, batch["labels"][0, 1:])
    loss.backward()
    return float(loss.detach())


def run_by(model: Any, way: str) -> None:
    """Choose how the recurrent layers of a model with trees run on a row: "pieces", "whole_paths", or as they are."""
    for layer in path_dependent_layers(model):
        mode = ReplayMode(starts_from_state=False) if way == "whole_paths" else layer._replay.mode
        layer._replay = replace(layer._replay, kernels=None, mode=mode)


def hybrid_on_trees(way: str) -> Any:
    model = small_hybrid()
    enable_tree(model)
    if way != "row_kernels":
        run_by(model, way)
    return model


def modes() -> dict[str, Callable[[list[Sample]], float]]:
    """Return a step function per mode, each with its own copy of the same model."""
    plain, on_trees = small_hybrid(), {way: hybrid_on_trees(way) for way in WAYS}
    steps = {way: partial(single_pass, model) for way, model in on_trees.items()}
    return {"npass": partial(sample_by_sample, plain), "npass_padded": partial(padded_batch, plain), **steps}


def measure(turns: int, rounds: int) -> dict[str, Any]:
    samples = conversation(turns, VOCABULARY, seed=0, sizes=SIZES)
    seconds: dict[str, list[float]] = {}
    losses = {}
    steps = modes()
    for _ in range(rounds + 1):  # the first warms up
        for name, step in steps.items():
            start = time.process_time()
            losses[name] = step(samples)
            seconds.setdefault(name, []).append(time.process_time() - start)
    assert max(losses.values()) - min(losses.values()) < 1e-4, losses
    least = {name: min(times[1:]) for name, times in seconds.items()}
    tree = PrefixTree.from_samples(samples)
    return {
        "turns": turns,
        "sample_tokens": tree.num_sample_tokens,
        "tree_tokens": len(tree),
        "seconds": {name: round(value, 4) for name, value in least.items()},
        "speedup": {name: round(value / least["row_kernels"], 2) for name, value in least.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    results = [measure(turns, arguments.rounds) for turns in arguments.turns]
    for result in results:
        print(json.dumps(result))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**describe("cpu", "hybrid_step"), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
