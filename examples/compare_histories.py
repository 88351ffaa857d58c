"""
Does it matter how much earlier reasoning a turn sees? Train with each policy, and test on the contexts as served.

    trl-singlepass demo-data out/demo-data.jsonl
    python examples/compare_histories.py --learning_rate 1e-3 # for a model with random weights

`template` trains every turn in the context that the chat template renders at inference, `keep` with the reasoning of
all earlier turns (as most tools do), and `strip` without any. All three are tested on held-out conversations as the
template serves them, so the last column shows what a policy costs when the model is used.
"""

import argparse
import os
from typing import Any

import torch
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table

from trl_singlepass import SinglePassSFTConfig, SinglePassSFTTrainer


POLICIES = ("template", "keep", "strip")


def train(policy: str, options: argparse.Namespace, train_set: Dataset, test_set: Dataset) -> tuple[int, float, float]:
    """Return the number of tokens, the last training loss, and the loss on test conversations as they are served."""
    trainer = SinglePassSFTTrainer(
        model=options.model,
        args=SinglePassSFTConfig(
            output_dir=f"out/histories/{policy}",
            history=policy,
            max_steps=options.max_steps,
            per_device_train_batch_size=4,
            learning_rate=options.learning_rate,
            logging_steps=options.max_steps,
            save_strategy="no",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=train_set,
        eval_dataset=test_set.add_column("history", ["template"] * len(test_set)),  # this column overrides `history`
    )
    trainer.train()
    logged: dict[str, Any] = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return int(logged["num_tokens"]), logged["loss"], trainer.evaluate()["eval_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL", "Qwen/Qwen3-0.6B"))
    parser.add_argument("--data", default="out/demo-data.jsonl")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    options = parser.parse_args()

    data = load_dataset("json", data_files=options.data, split="train").train_test_split(test_size=0.1, seed=0)
    table = Table("history", "tokens", "training loss", "loss as served", title=f"{options.max_steps} steps")
    for policy in POLICIES:
        tokens, training_loss, served_loss = train(policy, options, data["train"], data["test"])
        table.add_row(policy, f"{tokens:,}", f"{training_loss:.4f}", f"{served_loss:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
