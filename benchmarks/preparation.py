"""
Measure how many conversations per second are prepared, in one process, next to TRL preparing their N samples, and next
to TRL preparing each as one sequence.

    python -m benchmarks.preparation --tokenizer Qwen/Qwen3-0.6B
"""

import argparse
import itertools
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

from benchmarks.machine import describe
from trl_singlepass import SinglePassSFTConfig, SinglePassSFTTrainer


RESULTS = Path(__file__).parent / "results" / "preparation.json"
WORDS = """
the of and to in is that it was for on are with as his they at be this have from or had by hot but some what there we
can out other were all your when up use word how said each she which do their time if will way about many then them
would write like so these her long make thing see him two has look more day could go come did my sound no most number
who over know water than call first people may down side been now find any new work part take get place made compute
therefore function return value 12 7 2024 x = y + z ( ) , . ; : matrix gradient integral
""".split()  # noqa: SIM905


def text(source: random.Random, low: int, high: int) -> str:
    """Return words in lines like those of reasoning, about one token per word."""
    words = [source.choice(WORDS) for _ in range(source.randint(low, high))]
    return "\n".join(" ".join(words[start : start + 14]) for start in range(0, len(words), 14))


def conversation(turns: int, seed: int) -> list[dict[str, str]]:
    source = random.Random(seed)
    messages = [{"role": "system", "content": text(source, 60, 90)}]
    for _ in range(turns):
        messages.append({"role": "user", "content": text(source, 40, 80)})
        answer = {"reasoning_content": text(source, 200, 600), "content": text(source, 80, 160)}
        messages.append({"role": "assistant", **answer})
    return messages


def expanded(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return the samples that N-pass trains: one per assistant message."""
    return [
        {"prompt": messages[:index], "completion": [message]}
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def tiny_model(tokenizer: Any) -> Qwen3ForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=8, **sizes))


def seconds_to_prepare(trainer_class: Any, config_class: Any, rows: list[dict[str, Any]], tokenizer: Any) -> Any:
    """Return the seconds of CPU time and by the clock from rows to a prepared dataset on disk, and the dataset."""
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(folder, report_to="none", use_cpu=True, bf16=False, max_length=None)
        one_row = datasets.Dataset.from_list(rows[:1])
        trainer = trainer_class(tiny_model(tokenizer), args, train_dataset=one_row, processing_class=tokenizer)
        dataset = datasets.Dataset.from_list(rows)
        start = time.process_time(), time.perf_counter()
        prepared = trainer._prepare_dataset(dataset, tokenizer, args, False, None, "train")
        return (time.process_time() - start[0], time.perf_counter() - start[1]), prepared


def measure(turns: int, num_conversations: int, rounds: int, tokenizer: Any) -> dict[str, Any]:
    chats = [conversation(turns, seed) for seed in range(num_conversations)]
    whole = [{"messages": chat} for chat in chats]
    samples = [row for chat in chats for row in expanded(chat)]
    ways = {
        "single_pass": (SinglePassSFTTrainer, SinglePassSFTConfig, whole),
        "trl_samples": (SFTTrainer, SFTConfig, samples),
        "trl_one_sequence": (SFTTrainer, SFTConfig, whole),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    prepared = {}
    for _ in range(rounds):
        for name, way in ways.items():
            of_way, prepared[name] = seconds_to_prepare(*way, tokenizer)
            seconds[name].append(of_way)
    tokens = {name: sum(map(len, rows["input_ids"])) / num_conversations for name, rows in prepared.items()}
    of_samples = sum(map(sum, prepared["single_pass"]["multiplicity"]))
    assert of_samples == sum(map(len, prepared["trl_samples"]["input_ids"])), "both prepare the same tokens"
    cpu_milliseconds, milliseconds = (
        {name: 1000 * min(each[kind] for each in of_way) / num_conversations for name, of_way in seconds.items()}
        for kind in (0, 1)
    )
    return {
        "turns": turns,
        "conversations": num_conversations,
        "tokens": tokens,
        "milliseconds": milliseconds,
        "cpu_milliseconds": cpu_milliseconds,
        "speedup": milliseconds["trl_samples"] / milliseconds["single_pass"],
        "microseconds_per_tree_token": 1000 * cpu_milliseconds["single_pass"] / tokens["single_pass"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="Qwen/Qwen3-0.6B", help="path or Hub id of a tokenizer")
    parser.add_argument("--chat-template", help="file with a chat template to use instead of the tokenizer's own")
    parser.add_argument("--turns", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument(
        "--turns-in-all", type=int, nargs="+", default=[512, 2048], help="of a dataset, over all conversations"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="print the result instead of writing it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    if arguments.chat_template:
        tokenizer.chat_template = Path(arguments.chat_template).read_text()
    results = []
    for turns, in_all in itertools.product(arguments.turns, arguments.turns_in_all):
        results.append(measure(turns, max(in_all // turns, 2), arguments.rounds, tokenizer))
        print(json.dumps(results[-1], indent=2), flush=True)
    fewest, most = (results[i]["microseconds_per_tree_token"] for i in (len(arguments.turns_in_all) - 1, -1))
    growth = most / fewest
    print(f"Time grows {growth:.2f} times as fast as tree tokens.")
    if not arguments.dry_run:
        result = {**describe("cpu", "preparation"), "results": results, "growth_over_tree_tokens": growth}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
