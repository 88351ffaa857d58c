"""One training run of the study: what it is, how many steps it takes, and the file that holds its result."""

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
from studies.exactness.arms import ARMS, Prepared, steps_in_order
from studies.exactness.evaluate import Answerer, accuracy
from studies.exactness.models import SUBJECTS, Subject
from studies.exactness.task import TURNS, answers, conversations
from trl_singlepass.reference.float64 import ForcedFloat64


RESULTS = Path(__file__).parent / "results"
# `tokens`: as many optimizer steps, of as many trained tokens, in every arm. `flops`: as many counted operations as
# single pass takes for them, which stand for time. `control`: the first steps of two arms in float64, no evaluation.
SETTINGS = ("tokens", "flops", "control")
SEEDS = range(5)
CONTROL_ARMS, CONTROL_STEPS = ("single_pass", "npass"), 30
TEST_SEED = 1_000_000  # no training run draws its conversations by it


@dataclass(frozen=True)
class Run:
    """One cell of the study."""

    model: str
    setting: str
    arm: str
    seed: int

    @property
    def subject(self) -> Subject:
        return SUBJECTS[self.model]

    def path(self, folder: Path) -> Path:
        return folder / self.model / f"{self.setting}-{self.arm}-{self.seed}.json"

    def plan(self) -> dict[str, Any]:
        """What the result depends on; a file with another plan is not this run's."""
        sizes = {name: value for name, value in asdict(self.subject).items() if isinstance(value, int | float)}
        return {**asdict(self), **sizes}


def cells(model: str, settings: Iterable[str], arms: Iterable[str], seeds: Iterable[int]) -> Iterator[Run]:
    """All runs that are asked for; what single pass does in its steps is its run in both settings."""
    for seed, setting, arm in product(seeds, settings, arms):
        if arm in CONTROL_ARMS if setting == "control" else (setting, arm) != ("flops", "single_pass"):
            yield Run(model, setting, arm, seed)


def finished(run: Run, folder: Path) -> bool:
    """Whether the run's result is there already; a result of other sizes is an error."""
    path = run.path(folder)
    if not path.exists():
        return False
    if json.loads(path.read_text())["plan"] != run.plan():
        raise SystemExit(f"{path} holds a run of other sizes. Delete it, or write elsewhere with --output.")
    return True


class Steps(TrainerCallback):
    """Tells a progress bar of every step."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.advance()


class Workplace:
    """Data, tokenizer and trainers of one model and seed."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self.subject, self.seed = subject, seed
        self.tokenizer = self.subject.tokenizer()
        self.rows = conversations(seed, self.subject.conversations)
        self._budget: int | None = None

    def build(self, arm: str, output: str) -> tuple[Any, Prepared]:
        model = self.subject.model(self.seed, self.tokenizer)
        trainer = ARMS[arm].build(model, self.tokenizer, self.rows, self._arguments(output))
        return trainer, Prepared(trainer, [len(answers(row)) if arm == "npass" else 1 for row in self.rows])

    def _arguments(self, output: str) -> dict[str, Any]:
        """Arguments that all trainers get; `max_steps` follows once the dataset is prepared."""
        return {
            "output_dir": output,
            "learning_rate": self.subject.learning_rate,
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
        """The conversations of every step."""
        endless = steps_in_order(self.seed, prepared, self.subject.trained_tokens_per_step)
        if setting != "flops":
            return list(islice(endless, self.subject.steps))
        return list(within(self.budget(), endless, prepared))

    def budget(self) -> int:
        """Counted operations of single pass in its steps."""
        if self._budget is None:
            with TemporaryDirectory() as output:
                prepared = self.build("single_pass", output)[1]
            steps = self.steps("tokens", prepared)
            self._budget = sum(prepared.flops[conversation] for step in steps for conversation in step)
        return self._budget


def within(budget: int, steps: Iterator[list[int]], prepared: Prepared) -> Iterator[list[int]]:
    """The steps that a number of operations is enough for."""
    for step in steps:
        budget -= sum(prepared.flops[conversation] for conversation in step)
        if budget < 0:
            return
        yield step


def execute(run: Run, workplace: Workplace, advance: Callable[[], None]) -> dict[str, Any]:
    """Train and evaluate; `advance` is called after every step."""
    is_control = run.setting == "control"
    with TemporaryDirectory() as output:
        trainer, prepared = workplace.build(run.arm, output)
        steps = workplace.steps(run.setting, prepared)
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
        "accuracy": {} if is_control else measure(run, workplace, trainer.model),
    }


def measure(run: Run, workplace: Workplace, model: torch.nn.Module) -> dict[str, list[float]]:
    """Accuracy on test conversations of the greatest length."""
    subject = run.subject
    rows = conversations(TEST_SEED + run.seed, subject.test_conversations, TURNS[-1:])
    return accuracy(Answerer(model, workplace.tokenizer, subject.prompts_per_batch, subject.max_new_tokens), rows)


def save(record: dict[str, Any], path: Path) -> None:
    """Write a result; a run that is killed leaves none behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)
