"""Train rows with images on two DDP processes: a script for `torchrun` that writes parameters to a file."""

from support.ddp_worker import write_results
from support.screen_conversations import screen_trainer
from support.trainers import parameters


# Family, batch size of each process, accumulation. With a batch size of 4, one process has an example without images.
CASES = {
    "one each": ("qwen3_vl", 1, 1),
    "accumulated": ("qwen3_vl", 1, 2),
    "text on one process": ("gemma3", 4, 1),
}


def train(case, output_dir):
    """Train one case; return the parameters."""
    trainer = screen_trainer(output_dir, *CASES[case])
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    return parameters(trainer)


if __name__ == "__main__":
    write_results(train, CASES)
