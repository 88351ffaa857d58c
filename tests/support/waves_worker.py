"""Train in waves on two DDP processes: a script for `torchrun` that writes its results to a file."""

import torch

from support.chat_tokenizers import make_tokenizer
from support.ddp_worker import full, lora, write_results
from support.paired_trainers import CONVERSATIONS, single_pass_trainer
from support.trainers import float32_model, logged, parameters


def mixture(tokenizer):
    torch.manual_seed(0)
    return float32_model(tokenizer, "qwen3-moe")


# One conversation has three turns, the next two: the ranks have different numbers of waves.
ONE_EACH = {"per_device_train_batch_size": 1}
CASES = {
    "cut": (full, {**ONE_EACH, "wave_tokens": 16}),
    "kept": (full, {**ONE_EACH, "wave_tokens": 100}),
    "accumulated": (full, {**ONE_EACH, "wave_tokens": 24, "gradient_accumulation_steps": 2, "max_steps": 2}),
    "kept-checkpointed": (full, {**ONE_EACH, "wave_tokens": 100, "gradient_checkpointing": True, "max_steps": 2}),
    "lora": (lora, {**ONE_EACH, "wave_tokens": 24, "gradient_accumulation_steps": 2}),
    # The search for unused parameters goes through the last wave only.
    "find-unused": (
        mixture,
        {
            **ONE_EACH,
            "wave_tokens": 16,
            "router_aux_loss_coef": 0.0,
            "ddp_find_unused_parameters": True,
            "max_steps": 2,
        },
    ),
}


def train(case, output_dir):
    """Train one case; return parameters, losses, evaluation loss, and the number of waves of each rank."""
    make_model, settings = CASES[case]
    tokenizer = make_tokenizer("qwen3")
    settings = {"per_device_eval_batch_size": 1, **settings}
    model = make_model(tokenizer)
    trainer = single_pass_trainer(output_dir, tokenizer, model, evaluation=CONVERSATIONS[:5], **settings)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    num_waves = [None, None]
    torch.distributed.all_gather_object(num_waves, logged(trainer, "num_waves"))
    evaluation = trainer.evaluate()
    return {
        "parameters": parameters(trainer),
        "loss": logged(trainer, "loss"),
        "eval_loss": evaluation["eval_loss"],
        "num_waves": num_waves,
    }


if __name__ == "__main__":
    write_results(train, CASES)
