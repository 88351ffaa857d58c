"""Train a single pass on two DDP processes: a script for `torchrun` that writes its results to a file."""

import os
import sys
import tempfile
from pathlib import Path

import torch

from support.chat_tokenizers import make_tokenizer
from support.paired_trainers import CONVERSATIONS, adapted, single_pass_trainer
from support.trainers import float32_model, logged, parameters


def full(tokenizer):
    torch.manual_seed(0)
    return float32_model(tokenizer)


def lora(tokenizer):
    return adapted(full(tokenizer))


CASES = {
    "full": (full, {"per_device_train_batch_size": 1}),
    "accumulated": (full, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2}),
    "checkpointed": (full, {"per_device_train_batch_size": 2, "gradient_checkpointing": True}),
    "lora": (lora, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    "lora-checkpointed": (lora, {"per_device_train_batch_size": 2, "gradient_checkpointing": True}),
}


def train(case, output_dir):
    """Train one case; return parameters, losses and evaluation loss."""
    model, settings = CASES[case]
    tokenizer = make_tokenizer("qwen3")
    # Five conversations on two processes: the last batch is filled up with one that must not count twice.
    settings = {"per_device_eval_batch_size": 1, **settings}
    trainer = single_pass_trainer(output_dir, tokenizer, model(tokenizer), evaluation=CONVERSATIONS[:5], **settings)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    evaluation = trainer.evaluate()
    return {
        "parameters": parameters(trainer),
        "loss": logged(trainer, "loss"),
        "eval_loss": evaluation["eval_loss"],
    }


def write_results(train, cases):
    """Train every case on both processes; the first writes the results to the file that the command line names."""
    torch.set_num_threads(1)
    results = {case: train(case, tempfile.mkdtemp()) for case in cases}
    if int(os.environ["RANK"]) == 0:
        torch.save(results, Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort an ordinary exit after everything is done


if __name__ == "__main__":
    write_results(train, CASES)
