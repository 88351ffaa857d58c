"""One training run of the study: its configuration, its number of steps, and the file with its result."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.machine import describe
from studies.exactness.arms import ARMS, Prepared, ordered_steps
from studies.exactness.evaluate import Answerer, accuracy
from studies.exactness.models import STUDY_MODELS, StudyModel
from studies.exactness.task import TURNS, answers, conversations
from trl_singlepass.reference.verification import ForcedFloat64


RESULTS = Path(__file__).parent / "results"
# `tokens`: equally many optimizer steps and trained tokens in every arm. `flops`: as many counted operations as the
# single pass needs for them, in place of time. `control`: the first steps of two arms in float64, without evaluation.
SETTINGS = ("tokens", "flops", "control")
SEEDS = range(5)
CONTROL_ARMS, CONTROL_STEPS = ("single_pass", "npass"), 30
TEST_SEED = 1_000_000  # no training run draws its conversations with this seed


@dataclass(frozen=True)
class Run:
    """One combination of model, setting, arm and seed."""

    model: str
    setting: str
    arm: str
    seed: int

    @property
    def study_model(self) -> StudyModel:
        return STUDY_MODELS[self.model]

    def path(self, folder: Path) -> Path:
        return folder / self.model / f"{self.setting}-{self.arm}-{self.seed}.json"

    def plan(self) -> dict[str, Any]:
        """Return the sizes that the result depends on; a file with another plan belongs to another run."""
        sizes = {name: value for name, value in asdict(self.study_model).items() if isinstance(value, int | float)}
        return {**asdict(self), **sizes}


def list_runs(model: str, settings: Iterable[str], arms: Iterable[str], seeds: Iterable[int]) -> Iterator[Run]:
    """Yield all requested runs; the single pass has one run that counts in both settings."""
    for seed, setting, arm in product(seeds, settings, arms):
        if arm in CONTROL_ARMS if setting == "control" else (setting, arm) != ("flops", "single_pass"):
            yield Run(model, setting, arm, seed)


def is_finished(run: Run, folder: Path) -> bool:
    """Whether the result of a run exists; a result with other sizes is an error."""
    path = run.path(folder)
    if not path.exists():
        return False
    if json.loads(path.read_text())["plan"] != run.plan():
        raise SystemExit(f"{path} holds a run with other sizes. Delete it, or write elsewhere with --output.")
    return True


class Steps(TrainerCallback):
    """Advances a progress bar with every step."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.advance()


class Experiment:
    """Data, tokenizer and trainers for one model and seed."""

    def __init__(self, study_model: StudyModel, seed: int) -> None:
        self.study_model, self.seed = study_model, seed
        self.tokenizer = self.study_model.tokenizer()
        self.rows = conversations(seed, self.study_model.conversations)
        self._budget: int | None = None

    def build(self, arm: str, output: str) -> tuple[Any, Prepared]:
        model = self.study_model.model(self.seed, self.tokenizer)
        trainer = ARMS[arm].build(model, self.tokenizer, self.rows, self._arguments(output))
        return trainer, Prepared(trainer, [len(answers(row)) if arm == "npass" else 1 for row in self.rows])

    def _arguments(self, output: str) -> dict[str, Any]:
        """Return the arguments of all trainers; `max_steps` is set once the dataset is prepared."""
        return {
            "output_dir": output,
            "learning_rate": self.study_model.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 20,
            "adam_beta2": 0.98,
            "max_length": None,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "logging_strategy": "no",
            "disable_tqdm": True,
            "save_strategy": "no",
            "report_to": "none",
            "seed": self.seed,
        }

    def steps(self, setting: str, prepared: Prepared) -> list[list[int]]:
        """Return the conversations of every step."""
        endless = ordered_steps(self.seed, prepared, self.study_model.trained_tokens_per_step)
        if setting != "flops":
            return list(islice(endless, self.study_model.steps))
        return list(steps_within_budget(self.budget(), endless, prepared))

    def budget(self) -> int:
        """Return the counted operations of the single pass in its steps."""
        if self._budget is None:
            with TemporaryDirectory() as output:
                prepared = self.build("single_pass", output)[1]
            steps = self.steps("tokens", prepared)
            self._budget = sum(prepared.flops[conversation] for step in steps for conversation in step)
        return self._budget


def steps_within_budget(budget: int, steps: Iterator[list[int]], prepared: Prepared) -> Iterator[list[int]]:
    """Yield steps as long as their operations fit in the budget."""
    for step in steps:
        budget -= sum(prepared.flops[conversation] for conversation in step)
        if budget < 0:
            return
        yield step


def execute(run: Run, experiment: Experiment, advance: Callable[[], None]) -> dict[str, Any]:
    """Train and evaluate, calling `advance` after every step."""
    is_control = run.setting == "control"
    with TemporaryDirectory() as output:
        trainer, prepared = experiment.build(run.arm, output)
        steps = experiment.steps(run.setting, prepared)
        trainer.steps = prepared.rows_of(steps[:CONTROL_STEPS] if is_control else steps)
        trainer.args.max_steps = len(trainer.steps)
        trainer.add_callback(Steps(advance))
        if is_control:
            trainer.model.double()
        start = time.process_time()
        with ForcedFloat64() if is_control else nullcontext():
            trainer.train()
        seconds = time.process_time() - start
    trained = [conversation for step in steps for conversation in step]
    return {
        "plan": run.plan(),
        **describe("cpu"),
        "steps": len(trainer.steps),
        "conversations": len(trained),
        "trained_tokens": sum(prepared.trained_tokens[conversation] for conversation in trained),
        "flops": sum(prepared.flops[conversation] for conversation in trained),
        "cpu_seconds": round(seconds, 1),
        "losses": trainer.losses,
        "accuracy": {} if is_control else measure(run, experiment, trainer.model),
    }


def measure(run: Run, experiment: Experiment, model: torch.nn.Module) -> dict[str, list[float]]:
    """Return the accuracy on test conversations of the greatest length."""
    study_model = run.study_model
    rows = conversations(TEST_SEED + run.seed, study_model.test_conversations, TURNS[-1:])
    return accuracy(
        Answerer(model, experiment.tokenizer, study_model.prompts_per_batch, study_model.max_new_tokens), rows
    )


def save(record: dict[str, Any], path: Path) -> None:
    """Write a result; a run that is killed leaves no file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)
