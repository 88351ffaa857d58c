"""
Measure the loss of a group of completions: on one tree next to TRL's padded lines.

    python -m benchmarks.groups --minutes 15
    python -m benchmarks.groups --rollouts # one rollout of several requests, whose template strips reasoning

A step is a forward and backward pass of the policy for one group; nothing is generated. Operations are counted for all
sizes. Time is measured in rounds, the smallest sizes first, as long as they fit into what is left of `--minutes`, in
CPU time of one thread. Both ways alternate, and a speed-up is the median of the ratios within a round. The time of
trees includes building them; `deciding` is what is added where lines share nothing and run as TRL runs them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config

from benchmarks.machine import describe
from benchmarks.preference import MODEL as TWO_LAYERS
from benchmarks.preference import TINY, make_model
from trl_singlepass import PrefixTree, Sample, tree_log_probs
from trl_singlepass.cost import ModelShape, npass_cost, single_pass_cost
from trl_singlepass.groups.contexts import RequestLines, Rollout
from trl_singlepass.groups.lines import PaddedLines


RESULTS = Path(__file__).parent / "results" / "groups.json"
MODEL = {**TWO_LAYERS, "num_hidden_layers": 1}
PROMPTS, COMPLETIONS, GROUPS = (200, 2000, 8000), (100, 500, 2000), (4, 8, 16)
Size = tuple[int, int, int]
"""Tokens of the prompt, tokens of each completion, completions."""


def make_group(size: Size, vocab_size: int) -> torch.Tensor:
    """Return lines of random tokens that share a prompt, `(num_completions, num_tokens)`."""
    prompt_tokens, completion_tokens, number = size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocab_size, (prompt_tokens,), generator=generator)
    completions = torch.randint(vocab_size, (number, completion_tokens), generator=generator)
    return torch.cat([prompt.expand(number, -1), completions], dim=1)


def count(size: Size, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return tokens and operations of a step, of lines and of their tree."""
    lines, shape = make_group(size, sizes["vocab_size"]).numpy(), ModelShape.from_config(Qwen3Config(**sizes))
    samples = [Sample.from_prompt_and_completion(line[: size[0]], line[size[0] :]) for line in lines]
    tree = PrefixTree.from_samples(samples)
    return {
        "tokens": {"stock": lines.size, "tree": len(tree)},
        "flops": {"stock": npass_cost(samples, shape).flops, "tree": single_pass_cost([tree], shape).flops},
    }


# Two ways to the log-probabilities of a group ------------------------------------------------------------------------


def stock(model: PreTrainedModel, lines: torch.Tensor, is_scored: torch.Tensor) -> torch.Tensor:
    labels = lines.masked_fill(~is_scored, -100)
    log_probs: torch.Tensor = model(
        input_ids=lines, attention_mask=torch.ones_like(lines), labels=labels, fused_lm_head=True
    ).log_probs
    return log_probs


def tree(model: PreTrainedModel, lines: torch.Tensor, is_scored: torch.Tensor) -> torch.Tensor:
    decide(lines)
    return tree_log_probs(model, lines, torch.ones_like(lines), is_scored)


def decide(lines: torch.Tensor) -> bool:
    """Return what the trainers ask for each batch: whether a tree saves something."""
    padded = PaddedLines(lines, torch.ones_like(lines))
    return padded.are_without_gaps and padded.sharing_factor >= 1.03


MODES: dict[str, Callable[[PreTrainedModel, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "stock": stock,
    "tree": tree,
}


def step(mode: str, model: PreTrainedModel, size: Size, vocab_size: int) -> torch.Tensor:
    """Run forward and backward, and return the loss, as GRPO has it in its first iteration."""
    lines = make_group(size, vocab_size)
    is_scored = torch.zeros_like(lines, dtype=torch.bool)
    is_scored[:, size[0] :] = True
    log_probs = MODES[mode](model, lines, is_scored)
    advantages = torch.linspace(-1, 1, size[2])[:, None]
    loss = -(torch.exp(log_probs - log_probs.detach()) * advantages * is_scored[:, 1:]).sum() / is_scored.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def cpu_time(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(sizes: dict[str, Any], groups: Sequence[Size], repeats: int, minutes: float) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    models = {mode: make_model(mode == "tree", sizes) for mode in MODES}
    for mode, model in models.items():
        step(mode, model, (50, 10, 2), sizes["vocab_size"])
    names = ("prompt", "completion", "group")
    rows = [{**dict(zip(names, size, strict=True)), **count(size, sizes)} for size in groups]
    start, measured_flops = time.monotonic(), 0.0
    for _ in range(repeats):
        for row in sorted(rows, key=lambda row: row["flops"]["stock"]):
            flops, spent = sum(row["flops"].values()), time.monotonic() - start
            if measured_flops and spent + spent * flops / measured_flops > 60 * minutes:
                break  # all others take longer
            add_round(row, models, sizes["vocab_size"])
            measured_flops += flops
            print(json.dumps({**row, "speed_up": speed_up(row), "counted": counted(row)}), flush=True)
    return rows


def add_round(row: dict[str, Any], models: dict[str, PreTrainedModel], vocab_size: int) -> None:
    """Measure both ways once more."""
    size = (row["prompt"], row["completion"], row["group"])
    seconds = row.setdefault("seconds", {mode: [] for mode in (*MODES, "deciding")})
    for mode, model in models.items():
        seconds[mode].append(cpu_time(partial(step, mode, model, size, vocab_size)))
        model.zero_grad()
    seconds["deciding"].append(cpu_time(partial(decide, make_group(size, vocab_size))))


# Rollouts of several requests ----------------------------------------------------------------------------------------

ROLLOUT_RESULTS = RESULTS.with_name("rollouts.json")
NUM_REQUESTS, SYSTEM, QUESTION, REASONING, ANSWER = (4, 8, 16), 400, 60, 150, 60
Request = tuple[torch.Tensor, torch.Tensor]
"""A prompt, and what was generated from it."""


def make_rollout(
    num_requests: int, vocab_size: int, scale: int = 1
) -> tuple[list[Request], torch.Tensor, torch.Tensor]:
    """Return the requests of a rollout as served, and TRL's line, which appends, with a mask of what it trains."""
    generator = torch.Generator().manual_seed(0)
    lengths = (QUESTION // scale, REASONING // scale, ANSWER // scale)
    served = appended = torch.randint(vocab_size, (SYSTEM // scale,), generator=generator)
    is_scored, requests = [torch.zeros(len(served), dtype=torch.bool)], []
    for _ in range(num_requests):
        question, reasoning, answer = (torch.randint(vocab_size, (n,), generator=generator) for n in lengths)
        served, output = torch.cat([served, question]), torch.cat([reasoning, answer])
        requests.append((served, output))
        appended, served = torch.cat([appended, question, output]), torch.cat([served, answer])
        is_scored += [torch.zeros(len(question), dtype=torch.bool), torch.ones(len(output), dtype=torch.bool)]
    return requests, appended[None], torch.cat(is_scored)[None]


def rollout_step(
    mode: str, model: PreTrainedModel, num_requests: int, vocab_size: int, scale: int = 1
) -> torch.Tensor:
    """Run forward and backward of a rollout, and return its loss: the mean over what was generated."""
    requests, appended, is_scored = make_rollout(num_requests, vocab_size, scale)
    if mode == "appended":
        parts = [stock(model, appended, is_scored)]
    elif mode == "requests":
        lines = [torch.cat(request)[None] for request in requests]
        masks = [
            torch.arange(line.shape[1])[None] >= len(prompt) for line, (prompt, _) in zip(lines, requests, strict=True)
        ]
        parts = [stock(model, line, mask) for line, mask in zip(lines, masks, strict=True)]
    else:
        prompts, outputs = zip(*requests, strict=True)
        ids = torch.cat(outputs)[None]
        rollout = Rollout(prompts, tuple(map(len, outputs)), torch.ones_like(ids[0]).bool())
        own = RequestLines.from_rollouts([rollout], ids, torch.ones_like(ids))
        is_output = torch.zeros_like(own.padded.attention_mask)
        is_output[:, -own.is_output.shape[1] :] = own.is_output
        parts = [tree_log_probs(model, own.padded.input_ids, own.padded.attention_mask, is_output)]
    # Of what is not generated, log-probabilities are 0.
    loss = -torch.stack([part.sum() for part in parts]).sum() / is_scored.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def measure_rollouts(sizes: dict[str, Any], repeats: int, scale: int = 1) -> list[dict[str, Any]]:
    """Return tokens and seconds of each way; all ways alternate."""
    torch.set_num_threads(1)
    modes = ("requests", "tree", "appended")
    models, rows = {mode: make_model(mode == "tree", sizes) for mode in modes}, []
    for number in NUM_REQUESTS:
        requests, appended, _ = make_rollout(number, sizes["vocab_size"], scale)
        samples = [Sample.from_prompt_and_completion(prompt.numpy(), output.numpy()) for prompt, output in requests]
        tokens = {"requests": sum(map(len, samples)), "tree": len(PrefixTree.from_samples(samples))}
        seconds: dict[str, list[float]] = {mode: [] for mode in modes}
        for _ in range(repeats + 1):  # the first is to warm up
            for mode, model in models.items():
                seconds[mode].append(cpu_time(partial(rollout_step, mode, model, number, sizes["vocab_size"], scale)))
                model.zero_grad()
        seconds = {mode: values[1:] for mode, values in seconds.items()}
        rows.append({"requests": number, "tokens": {**tokens, "appended": appended.numel()}, "seconds": seconds})
    return rows


def rollout_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return lines of Markdown: tokens of a rollout, and the time of the other ways ÷ that of the tree."""
    lines = [
        "| requests | tokens of rows | of the tree | of TRL's line | time of rows ÷ tree | of TRL's line ÷ tree |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        tokens = [f"{row['tokens'][mode]:,}" for mode in ("requests", "tree", "appended")]
        rounds = [
            dict(zip(row["seconds"], values, strict=True)) for values in zip(*row["seconds"].values(), strict=True)
        ]
        ratios = [f"{statistics.median(x[mode] / x['tree'] for x in rounds):.2f}" for mode in ("requests", "appended")]
        lines.append(f"| {' | '.join([str(row['requests']), *tokens, *ratios])} |")
    return lines


# Table of docs/groups.md ---------------------------------------------------------------------------------------------


def counted(row: dict[str, Any]) -> float:
    ratio: float = row["flops"]["stock"] / row["flops"]["tree"]
    return ratio


def speed_up(row: dict[str, Any]) -> float:
    """Return the median of the ratios of times within a round."""
    rounds = zip(row["seconds"]["stock"], row["seconds"]["tree"], strict=True)
    return statistics.median(stock / tree for stock, tree in rounds)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return lines of Markdown: tokens, operations and time of TRL's lines ÷ those of the tree."""
    lines = ["| prompt | completion | group | tokens | counted | measured |", "|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        sizes = [f"{row[name]:,}" for name in ("prompt", "completion", "group")]
        measured = f"{speed_up(row):.2f}" if "seconds" in row else ""
        tokens = row["tokens"]["stock"] / row["tokens"]["tree"]
        lines.append(f"| {' | '.join([*sizes, f'{tokens:.1f}', f'{counted(row):.2f}', measured])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--rollouts", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.rollouts:
        sizes = TINY if options.tiny else MODEL
        rows = measure_rollouts(sizes, options.repeats, 10 if options.tiny else 1)
        result = {**describe("cpu", "rollouts"), "model": sizes, "rows": rows}
        (options.output or ROLLOUT_RESULTS).write_text(json.dumps(result, indent=1) + "\n")
        print("\n".join(rollout_table(rows)))
        return
    sizes, groups = (TINY, [(50, 5, 2)]) if options.tiny else (MODEL, list(product(PROMPTS, COMPLETIONS, GROUPS)))
    rows = measure(sizes, groups, options.repeats, options.minutes)
    result = {**describe("cpu", "groups"), "model": sizes, "rows": rows}
    (options.output or RESULTS).write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
