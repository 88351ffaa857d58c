"""
Prefer one trajectory to another: DPO on conversations of several turns, each turn in the context as served.

    trl-singlepass demo-data out/demo-pairs.jsonl --pairs
    python examples/preference.py --learning_rate 1e-4 # for a model with random weights

The pairs are made up: each conversation is preferred to the same one with the answers of another. Bring your own in
the columns `prompt`, `chosen` and `rejected`.
"""

import argparse
import os

import torch
from datasets import load_dataset

from trl_singlepass import SinglePassDPOConfig, SinglePassDPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL", "Qwen/Qwen3-0.6B"))
    parser.add_argument("--data", default="out/demo-pairs.jsonl")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    options = parser.parse_args()

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
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
