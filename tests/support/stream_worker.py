"""
Train two processes on streams whose shards have unequal lengths.

A script for `torchrun`; each rank writes its results to the folder that the command line names.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import TrainerCallback

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat
from support.trainers import as_dataset, logged, parameters, single_pass_trainer


CHATS = [chat(1 + seed % 3, seed=seed) for seed in range(9)]
# Shards of the stream, batches per step, packing. In the first three cases, an epoch is one step.
CASES = {
    "one shard": (1, 5, False),
    "three shards": (3, 8, False),
    "packed": (3, 4, True),
    "several steps": (3, 2, False),
}


class Epochs(TrainerCallback):
    """Records the step and the number of trained tokens at the end of each epoch."""

    def __init__(self):
        self.ends = []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ends.append([state.global_step, float(self.trainer._counts._trained)])


def train(case, output):
    """Train two epochs of one case; return the results of this rank."""
    num_shards, num_accumulated, packing = CASES[case]
    epochs, seen = Epochs(), Counter()
    settings = {"packing": True, "max_row_tokens": 300} if packing else {}
    trainer = single_pass_trainer(
        output / "out",
        make_tokenizer("qwen3"),
        as_dataset(CHATS).to_iterable_dataset(num_shards=num_shards),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=num_accumulated,
        max_steps=2 if num_accumulated > 2 else 6,
        dataloader_pin_memory=False,
        kwargs={"callbacks": [epochs]},
        **settings,
    )
    epochs.trainer = trainer
    collate = trainer.data_collator

    def count(examples):
        batch = collate(examples)
        labels = batch["labels"]
        seen.update(labels[labels != -100].tolist())
        return batch

    trainer.data_collator = count
    trainer.train()
    return {
        "parameters": {name: float(value.double().sum()) for name, value in parameters(trainer).items()},
        "loss": logged(trainer, "loss"),
        "epochs": epochs.ends,
        "seen": sorted(seen.items()),
    }


def main():
    """Train every case and write the results of this rank."""
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    results = {case: train(case, output) for case in CASES}
    rank = torch.distributed.get_rank()
    (output / f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an ordinary exit after everything is done


if __name__ == "__main__":
    main()
