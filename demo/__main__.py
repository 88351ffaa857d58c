"""Fine-tune a small model in one pass and in N passes, and compare: `make demo`, or `python -m demo --help`."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

from demo.compare import Comparison, draw_conversation
from demo.load import load_model, load_rows, load_tokenizer
from demo.train import Task
from trl_singlepass import verify
from trl_singlepass.cost import ModelShape
from trl_singlepass.rendering.samples import render_example


MODES = ("npass", "single_pass")
DEFAULT_STEPS, DEFAULT_STEPS_OF_A_GIVEN_MODEL = 30, 4
VERIFIED_ROWS = 3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument(
        "--model", help="path or Hub id of a causal language model (default: a small Qwen3 with random weights)"
    )
    parser.add_argument(
        "--data", help="JSON Lines or Parquet file, or Hub id of a dataset (default: the conversations of the demo)"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 30, or 4 with --model)")
    parser.add_argument("--conversations-per-step", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, help="default: 2e-3, or 1e-5 with --model")
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    return parser.parse_args()


def make_task(args: argparse.Namespace, num_rows: int) -> Task:
    steps = args.steps or (DEFAULT_STEPS_OF_A_GIVEN_MODEL if args.model else DEFAULT_STEPS)
    fitting = num_rows // args.conversations_per_step
    if fitting == 0:
        raise SystemExit(
            f"Expected at least {args.conversations_per_step} conversations, as one step takes, got {num_rows}. "
            "Pass a smaller --conversations-per-step."
        )
    rate = args.learning_rate or (1e-5 if args.model else 2e-3)
    return Task(args.model, args.data, min(steps, fitting), args.conversations_per_step, rate)


class Run:
    """A training run in its own process, with a log file next to its result."""

    def __init__(self, mode: str, task: Task, folder: Path) -> None:
        self.mode, self.result, self.log = mode, folder / f"{mode}.json", folder / f"{mode}.log"
        command = [sys.executable, "-m", "demo.train", mode, json.dumps(asdict(task)), str(self.result)]
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment())

    def wait(self) -> dict[str, Any]:
        if self.process.wait() != 0:
            end = "\n".join(self.log.read_text().splitlines()[-15:])
            raise SystemExit(f"Training ({self.mode}) failed. The end of {self.log}:\n{end}")
        return json.loads(self.result.read_text())


def environment() -> dict[str, str]:
    # With one thread, CPU time measures work rather than waiting, however busy the machine is.
    return dict(os.environ) if torch.cuda.is_available() else {**os.environ, "OMP_NUM_THREADS": "1"}


def train_both(task: Task, folder: Path) -> list[dict[str, Any]]:
    """Run both trainers: at the same time on a CPU, one after the other on a GPU."""
    if torch.cuda.is_available():
        return [Run(mode, task, folder).wait() for mode in MODES]
    return [run.wait() for run in [Run(mode, task, folder) for mode in MODES]]


def main() -> None:
    args, console = parse(), Console()
    args.output.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    tokenizer = load_tokenizer(args.model)
    data = load_rows(args.data, (args.steps or DEFAULT_STEPS) * args.conversations_per_step)
    task = make_task(args, len(data))
    data = data[: task.steps * task.conversations_per_step]
    rows = [render_example(row, tokenizer, example_index=index) for index, row in enumerate(data)]
    with console.status(f"Training {task.steps} steps with SFTTrainer (N-pass) and with SinglePassSFTTrainer …"):
        npass, single_pass = train_both(task, args.output)
    with console.status(f"verify: losses and gradients of {VERIFIED_ROWS} conversations …"):
        torch.set_num_threads(1)  # on a busy machine, several threads that wait for each other are slower than one
        model = load_model(args.model, tokenizer)
        # The small model is fast enough for float64, where rounding cannot hide a mistake.
        report = verify(model if args.model else model.double(), tokenizer, data, max_rows=VERIFIED_ROWS)
    comparison = Comparison(npass, single_pass, rows, ModelShape.from_config(model.config), report)
    console.print(comparison.table())
    comparison.draw_losses(args.output / "loss.png")
    pictures = [args.output / "loss.png", *draw_conversation(rows, tokenizer, args.output)]
    console.print("Pictures: " + ", ".join(map(str, pictures)))


if __name__ == "__main__":
    main()
