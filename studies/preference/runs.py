"""One seed of the study: a fine-tuned model, pairs that it samples, and what each arm makes of both."""

import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback

from benchmarks.machine import describe
from studies.exactness.evaluate import Answerer, given_history, own_history
from studies.exactness.models import tiny_qwen3, word_tokenizer
from studies.exactness.task import Conversation, conversations
from studies.preference.arms import ARMS, Arm
from studies.preference.pairs import Sampler, sample_pairs
from trl_singlepass import SinglePassSFTConfig, SinglePassSFTTrainer


RESULTS = Path(__file__).parent / "results"
SEEDS = range(5)
# No two of these share a conversation, nor does a seed of `studies.exactness`.
PAIR_SEED, TEST_SEED = 2_000_000, 3_000_000


@dataclass(frozen=True)
class Sizes:
    """What the results depend on; a file with other sizes belongs to another run."""

    sft_conversations: int = 1500
    sft_steps: int = 300
    sft_learning_rate: float = 6e-3
    prompts: int = 300
    samples: int = 4
    pair_turns: tuple[int, int] = (3, 5)
    pairs_per_step: int = 8
    steps: int = 40
    learning_rates: tuple[float, ...] = (1e-4, 3e-4)
    beta: float = 0.1
    test_conversations: int = 60
    test_turns: int = 5
    prompts_per_batch: int = 400
    max_new_tokens: int = 20


class Experiment:
    """Tokenizer, fine-tuned model and pairs of one seed."""

    def __init__(self, seed: int, sizes: Sizes) -> None:
        self.seed, self.sizes, self.tokenizer = seed, sizes, word_tokenizer()
        self.weights = self._fine_tune(tiny_qwen3(seed, self.tokenizer))
        sampler = Sampler(self.fine_tuned(), self.tokenizer, sizes.prompts_per_batch, sizes.max_new_tokens)
        rows = conversations(PAIR_SEED + seed, sizes.prompts, range(*sizes.pair_turns))
        self.pairs = sample_pairs(sampler, rows, sizes.samples, seed)

    def _arguments(self, output: str, steps: int, learning_rate: float, batch_size: int) -> dict[str, Any]:
        return {
            "output_dir": output,
            "max_steps": steps,
            "learning_rate": learning_rate,
            "per_device_train_batch_size": batch_size,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, steps // 15),
            "adam_beta2": 0.98,
            "max_length": None,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "logging_steps": 1,
            "disable_tqdm": True,
            "save_strategy": "no",
            "report_to": "none",
            "seed": self.seed,
        }

    def fine_tuned(self) -> Any:
        """Return a model with the fine-tuned weights; a deep copy would share the forward that a trainer has set."""
        model = tiny_qwen3(self.seed, self.tokenizer)
        model.load_state_dict(self.weights)
        return model

    def _fine_tune(self, model: Any) -> Any:
        sizes, rows = self.sizes, conversations(self.seed, self.sizes.sft_conversations)
        with TemporaryDirectory() as output:
            arguments = self._arguments(output, sizes.sft_steps, sizes.sft_learning_rate, 6)
            trainer = SinglePassSFTTrainer(
                model, SinglePassSFTConfig(**arguments), None, Dataset.from_list(rows), processing_class=self.tokenizer
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer.model.state_dict()

    def prefer(self, arm: Arm, learning_rate: float) -> tuple[Any, list[float]]:
        """Return the fine-tuned model after DPO, and its losses step by step."""
        sizes, tokenizer = self.sizes, copy.deepcopy(self.tokenizer)
        tokenizer.chat_template = arm.template(tokenizer)
        with TemporaryDirectory() as output:
            arguments = self._arguments(output, sizes.steps, learning_rate, sizes.pairs_per_step)
            trainer = arm.trainer(
                self.fine_tuned(),
                self.fine_tuned(),
                arm.config(**arguments, beta=sizes.beta),
                train_dataset=Dataset.from_list(self.pairs),
                processing_class=tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def accuracy(self, model: Any) -> dict[str, list[float]]:
        """Return the accuracy by turn in the contexts that are served, behind right answers and behind its own."""
        sizes = self.sizes
        rows: list[Conversation] = conversations(
            TEST_SEED + self.seed, sizes.test_conversations, range(sizes.test_turns, sizes.test_turns + 1)
        )
        answerer = Answerer(model, self.tokenizer, sizes.prompts_per_batch, sizes.max_new_tokens)
        return {"given": given_history(answerer, rows), "own": own_history(answerer, rows)}


def execute(seed: int, sizes: Sizes) -> dict[str, Any]:
    """Fine-tune, sample pairs, and train and evaluate every arm with every learning rate."""
    start = time.process_time()
    experiment = Experiment(seed, sizes)
    turns = [len(pair["chosen"]) // 2 + 1 for pair in experiment.pairs]
    runs = []
    for name, arm in ARMS.items():
        for learning_rate in sizes.learning_rates:
            model, losses = experiment.prefer(arm, learning_rate)
            accuracy = experiment.accuracy(model)
            runs.append({"arm": name, "learning_rate": learning_rate, "losses": losses, "accuracy": accuracy})
    return {
        "seed": seed,
        "sizes": json.loads(json.dumps(asdict(sizes))),
        **describe("cpu"),
        "pairs": len(experiment.pairs),
        "turns_per_trajectory": sum(turns) / len(turns),
        "before": experiment.accuracy(experiment.fine_tuned()),
        "runs": runs,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def run_study(seeds: list[int], folder: Path, sizes: Sizes) -> None:
    """Execute the seeds whose result is not there yet."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        path = folder / f"seed-{seed}.json"
        if not path.exists():
            record = execute(seed, sizes)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(record, indent=1) + "\n")
            part.replace(path)
            print(f"{path}: {record['cpu_seconds']} s")
