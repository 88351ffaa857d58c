"""Train pairs on two DDP processes, in a single pass or stock: a script for `torchrun` that writes its results."""

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import load_dataset

from support.chat_tokenizers import make_tokenizer
from support.pairs import SINGLE_TURNS, TRAJECTORIES, adapted_model, dpo_trainer, stock_dpo_trainer
from support.trainers import float32_model, logged, parameters


def full(tokenizer):
    return float32_model(tokenizer)


STEPS = {"max_steps": 20, "learning_rate": 0.02, "max_grad_norm": 1.0}
GRID = {
    f"{name}, {size} pairs, {accumulation} batches{', precomputed' * precomputed}": (
        make_model,
        {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "precompute_ref_log_probs": precomputed,
        },
    )
    for (name, make_model), size, accumulation, precomputed in itertools.product(
        {"full": full, "lora": adapted_model}.items(), (1, 2), (1, 2), (False, True)
    )
}
# Name -> model, trained by both trainers on pairs of a single turn.
CASES = {
    **GRID,
    # The last batch of an epoch is incomplete, and accelerate fills it up.
    "incomplete": (full, {"per_device_train_batch_size": 3, "gradient_checkpointing": False}),
}


def train(trainer):
    """Return parameters and logs after training."""
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    return {"parameters": parameters(trainer), "loss": logged(trainer, "loss")}


def on_disk(pairs, folder):
    """Return pairs as a dataset whose cache all processes share, where one writes what others read."""
    path = folder / "pairs.jsonl"
    if int(os.environ["RANK"]) == 0:
        path.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    with PartialState().main_process_first():
        return load_dataset("json", data_files=str(path), cache_dir=str(folder), split="train")


def main():
    """Train every case both ways, and several turns in a single pass; the first process writes what came out."""
    torch.set_num_threads(1)
    tokenizer, results = make_tokenizer("qwen3"), {}
    single_turns = on_disk(SINGLE_TURNS, Path(sys.argv[1]).parent)
    for case, (make_model, settings) in CASES.items():
        for name, make_trainer in (("single pass", dpo_trainer), ("stock", stock_dpo_trainer)):
            model = make_model(tokenizer)
            reference = None if make_model is adapted_model else "perturbed"
            trainer = make_trainer(
                tempfile.mkdtemp(), tokenizer, single_turns, model, reference, **{**STEPS, **settings}
            )
            results[case, name] = train(trainer)
    trainer = dpo_trainer(
        tempfile.mkdtemp(), tokenizer, TRAJECTORIES * 2, full(tokenizer), per_device_train_batch_size=1, **STEPS
    )
    results["trajectories"] = train(trainer)
    if int(os.environ["RANK"]) == 0:
        torch.save(results, Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort an ordinary exit after everything is done


if __name__ == "__main__":
    main()
