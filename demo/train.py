"""One training run, in its own process so that peak memory is that of this run alone."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from demo.load import SEED, load_model, load_rows, load_tokenizer
from demo.npass import NPassTrainer, as_stock_dataset
from trl_singlepass import SinglePassSFTConfig, SinglePassSFTTrainer
from trl_singlepass.reference.timing import peak, reset_peak
from trl_singlepass.rendering.samples import render_example


@dataclass(frozen=True)
class Task:
    """Model, data and settings, the same for both trainers."""

    model: str | None
    data: str | None
    steps: int
    conversations_per_step: int
    learning_rate: float

    def first_conversations(self) -> range:
        """Return the index of the first conversation of every step."""
        return range(0, self.steps * self.conversations_per_step, self.conversations_per_step)


class Stopwatch(TrainerCallback):
    """Records the seconds of every step, including data loading."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time_now())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time_now())

    @property
    def seconds(self) -> list[float]:
        return [end - start for start, end in pairwise(self.times)]


def time_now() -> float:
    """Return wall time on a GPU; on a CPU, CPU time, which other programs do not disturb."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def arguments(task: Task, output: Path) -> dict[str, Any]:
    """Return the arguments that both trainers share."""
    return {
        "output_dir": str(output),
        "max_steps": task.steps,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": task.model is not None,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
    }


def single_pass_trainer(task: Task, output: Path) -> SFTTrainer:
    tokenizer = load_tokenizer(task.model)
    rows = load_rows(task.data, task.steps * task.conversations_per_step)
    return SinglePassSFTTrainer(
        model=load_model(task.model, tokenizer),
        args=SinglePassSFTConfig(
            **arguments(task, output),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=task.conversations_per_step,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def npass_trainer(task: Task, output: Path) -> SFTTrainer:
    tokenizer = load_tokenizer(task.model)
    rows = load_rows(task.data, task.steps * task.conversations_per_step)
    samples = [render_example(row, tokenizer) for row in rows]
    steps = [samples[first : first + task.conversations_per_step] for first in task.first_conversations()]
    return NPassTrainer(
        model=load_model(task.model, tokenizer),
        args=SFTConfig(**arguments(task, output), completion_only_loss=True),
        train_dataset=as_stock_dataset([sample for turns in samples for sample in turns]),
        processing_class=tokenizer,
        samples_per_step=[sum(map(len, step)) for step in steps],
    )


TRAINERS = {"single_pass": single_pass_trainer, "npass": npass_trainer}


def main(mode: str, task: Task, result: Path) -> None:
    """Train and write the measurements to a JSON file."""
    trainer, stopwatch = TRAINERS[mode](task, result.with_suffix("")), Stopwatch()
    trainer.add_callback(stopwatch)
    before = reset_peak()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    on_gpu = torch.cuda.is_available()
    measured = {
        "mode": mode,
        "task": asdict(task),
        "losses": losses,
        "seconds": stopwatch.seconds,
        "memory": peak() - before,
        "clock": "wall time" if on_gpu else "CPU time of one thread",
        "batching": "samples of similar length in one forward pass"
        if on_gpu
        else "one sample per forward pass, without padding",
    }
    result.write_text(json.dumps(measured))


if __name__ == "__main__":
    main(sys.argv[1], Task(**json.loads(sys.argv[2])), Path(sys.argv[3]))
