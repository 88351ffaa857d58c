"""
Reward completions by a rule: GRPO, with what the completions of a prompt share computed once.

    trl-singlepass demo-data out/demo-pairs.jsonl --pairs
    python examples/grpo.py --learning_rate 3e-3 # for a model with random weights

Of the data, only the column `prompt` is read. The rule is made up: answers get more for more vowels. Bring your own,
as a function that returns a number for each completion.
"""

import argparse
import os
from typing import Any

import torch
from datasets import load_dataset

from trl_singlepass import SinglePassGRPOConfig, SinglePassGRPOTrainer


def share_of_vowels(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    texts = [completion[0]["content"].lower() for completion in completions]
    return [sum(text.count(vowel) for vowel in "aeiou") / max(1, len(text)) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL", "Qwen/Qwen3-0.6B"))
    parser.add_argument("--data", default="out/demo-pairs.jsonl")
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    options = parser.parse_args()

    trainer = SinglePassGRPOTrainer(
        model=options.model,
        reward_funcs=share_of_vowels,
        args=SinglePassGRPOConfig(
            output_dir="out/grpo",
            max_steps=options.max_steps,
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=16,
            learning_rate=options.learning_rate,
            logging_steps=1,
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
