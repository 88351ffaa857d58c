"""
Train and evaluate every arm of the study: `python -m studies.exactness --help`.

Results that are there already are kept, so a run that was stopped goes on where it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging

from studies.exactness.arms import ARMS
from studies.exactness.models import STUDY_MODELS
from studies.exactness.runs import RESULTS, SEEDS, SETTINGS, Experiment, Run, execute, is_finished, list_runs, save


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies.exactness", description=__doc__.splitlines()[1])
    parser.add_argument(
        "--model", choices=STUDY_MODELS, default="qwen3", help="default: %(default)s, from random weights"
    )
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="SEED")
    parser.add_argument(
        "--setting", choices=SETTINGS, nargs="+", default=list(SETTINGS), metavar="SETTING", help=", ".join(SETTINGS)
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    return parser.parse_args(arguments)


def work_through(runs: Sequence[Run], folder: Path) -> None:
    """Execute runs one after another, with one bar for all of them and one for the current one's steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    experiment = None
    with Progress(*columns, TimeRemainingColumn()) as progress:
        overall = progress.add_task("runs", total=len(runs))
        for run in runs:
            if experiment is None or experiment.seed != run.seed:
                experiment = Experiment(run.study_model, run.seed)
            name = f"{run.setting} {run.arm} seed {run.seed}, steps"
            current = progress.add_task(name, total=None)
            save(execute(run, experiment, lambda task=current: progress.advance(task)), run.path(folder))
            progress.remove_task(current)
            progress.advance(overall)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine are slower than one
    runs = [
        run for run in list_runs(args.model, args.setting, args.arms, args.seeds) if not is_finished(run, args.output)
    ]
    work_through(runs, args.output)


if __name__ == "__main__":
    main()
