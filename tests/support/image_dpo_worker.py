"""Train pairs with images on two DDP processes: a script for `torchrun` that writes parameters to a file."""

from pathlib import Path

from support.ddp_worker import write_results
from support.pairs import perturbed
from support.screen_pairs import pair_trainer, some_pairs
from support.tiny_vision import tiny_vision_model
from support.trainers import parameters


STEPS = {"max_steps": 4, "learning_rate": 0.02, "train_sampling_strategy": "sequential"}
# Two processes have different numbers of rows.
CASES = {"one row": {}, "rows": {"max_row_tokens": 110}}


def train(case, output_dir):
    """Train one case; return the parameters."""
    model, processor = tiny_vision_model("qwen3_vl")
    pairs = some_pairs(Path(output_dir))
    settings = {"per_device_train_batch_size": 1, **STEPS, **CASES[case]}
    trainer = pair_trainer(Path(output_dir), model, processor, pairs, perturbed(model), **settings)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    return parameters(trainer)


if __name__ == "__main__":
    write_results(train, CASES)
