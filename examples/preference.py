"""
Prefer one trajectory to another: DPO on conversations of several turns, each turn in the context as served.

    trl-singlepass demo-data out/demo-data.jsonl
    python examples/preference.py --learning_rate 1e-4 # for a model with random weights

The pairs are made up: each conversation of the data is preferred to the same one with the answers of the next. Bring
your own in the columns `prompt`, `chosen` and `rejected`.
"""

import argparse
import itertools
import os
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset, load_dataset

from trl_singlepass import SinglePassDPOConfig, SinglePassDPOTrainer


def is_answer(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and not message.get("tool_calls")


def as_pairs(conversations: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for conversation, other in pairwise(conversations):
        messages, answers = conversation["messages"], list(filter(is_answer, other["messages"]))
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        places = itertools.count()
        rejected = [answers[next(places) % len(answers)] if is_answer(m) else m for m in messages[first:]]
        columns = {"prompt": messages[:first], "chosen": messages[first:], "rejected": rejected}
        yield columns | {name: conversation[name] for name in ("tools",) if conversation.get(name)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL", "Qwen/Qwen3-0.6B"))
    parser.add_argument("--data", default="out/demo-data.jsonl")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    options = parser.parse_args()

    conversations = load_dataset("json", data_files=options.data, split="train")
    trainer = SinglePassDPOTrainer(
        model=options.model,
        args=SinglePassDPOConfig(
            output_dir="out/preference",
            max_steps=options.max_steps,
            per_device_train_batch_size=2,
            learning_rate=options.learning_rate,
            logging_steps=1,
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=Dataset.from_list(list(as_pairs(conversations))),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
