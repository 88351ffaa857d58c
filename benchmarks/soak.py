"""
Train 2,000 steps on two ranks, from a packed stream, in waves: do memory, threads and open files stay constant?

    python -m benchmarks.soak

The stream begins anew about ten times, in the same order: the first and the last pass over it have the same rows, so
their times can be compared. Each rank looks at itself and at the processes that load its data after each step. Time is
processor time of the rank, divided by that of a fixed piece of work beside it, so that a machine that others use as
well changes little.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import TrainerCallback

from benchmarks.machine import describe


ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "soak.json"
STEPS = 2000
WORKERS = (0, 4)
CONVERSATIONS = 480  # about 190 steps
SETTLED = 0.25  # share of the steps after which memory is expected to be flat, but not before one pass over the data
MIB = 2**20
COLUMNS = ("seconds", "unit", "memory", "threads", "files")
LITTLE = 0.01  # share of the memory: growth that counts as none, since the C library keeps some of what is freed
SLOWER = 0.03


class Watch(TrainerCallback):
    """Records memory, threads, open files and time of each step, and where the data begins anew."""

    def __init__(self, steps: int) -> None:
        self.process = psutil.Process()
        # Made in advance: what a list of steps holds would count as growth.
        self.seen = np.zeros((steps, len(COLUMNS)))
        self.passes: list[int] = []
        # Work of the kind that a step has: many small operators, forward and backward.
        self.work = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.tokens = torch.randn(1, 256, 64)
        self.began = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.passes.append(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = time.process_time() - self.began
        self.seen[state.global_step - 1] = (seconds, self.fixed_work(), *self.look())

    def fixed_work(self) -> float:
        began = time.process_time()
        for _ in range(3):
            self.work(self.tokens).sum().backward()
        return time.process_time() - began

    def look(self) -> tuple[float, int, int]:
        processes = [self.process, *self.process.children(recursive=True)]
        return sum(map(own_bytes, processes)) / MIB, self.process.num_threads(), self.process.num_fds()


def own_bytes(process: psutil.Process) -> int:
    """Return the bytes of a process that are not backed by a file; 0 if it has just ended."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def train(num_workers: int, steps: int, folder: Path) -> None:
    """Train as one of two ranks, and write what was seen."""
    sys.path.insert(0, str(ROOT / "tests"))  # for tiny models, tokenizers and conversations
    from support.chat_tokenizers import make_tokenizer
    from support.conversations import chat
    from support.trainers import as_dataset, single_pass_trainer

    torch.set_num_threads(1)
    watch = Watch(steps)
    rows = as_dataset([chat(1 + seed % 5, seed=seed) for seed in range(CONVERSATIONS)])
    trainer = single_pass_trainer(
        folder / "out",
        make_tokenizer("qwen3"),
        rows.to_iterable_dataset(num_shards=8),
        per_device_train_batch_size=1,
        max_steps=steps,
        packing=True,
        max_row_tokens=300,
        wave_tokens=128,
        dataloader_num_workers=num_workers,
        dataloader_persistent_workers=num_workers > 0,
        dataloader_pin_memory=False,
        logging_steps=10,
        learning_rate=1e-3,
        kwargs={"callbacks": [watch]},
    )
    gc.collect()
    trainer.train()
    (folder / f"rank{trainer.args.process_index}.json").write_text(
        json.dumps({"passes": watch.passes, **dict(zip(COLUMNS, watch.seen.T.tolist(), strict=True))})
    )
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


def run(num_workers: int, steps: int) -> list[dict[str, Any]]:
    """Train on two ranks, and return what each saw."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "--module",
            "benchmarks.soak",
        ]
        arguments = ["--folder", folder, "--workers", str(num_workers), "--steps", str(steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, *launch, *arguments], cwd=ROOT, env=environment, check=True)
        seen = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return [{"workers": num_workers, "rank": rank, **summary(one)} for rank, one in enumerate(seen)]


def summary(seen: dict[str, list[float]]) -> dict[str, Any]:
    """
    Return how memory grows once it has settled, and the first and the last pass over the data side by side.

    `growth` is the slope of a line through memory, times its length, in MiB; `noise` is twice the standard deviation
    from the line. `threads` and `files` are the fewest of a pass, since batches that wait for their turn hold files
    open. `speed` is that of the last whole pass, relative to the first.
    """
    passes, columns = seen["passes"], {name: np.array(seen[name]) for name in COLUMNS}
    settled = max(int(SETTLED * len(columns["memory"])), int(passes[1]))  # every row was seen once
    memory = columns["memory"][settled:]
    place = np.arange(len(memory))
    slope, start = np.polyfit(place, memory, 1)
    cost = columns["seconds"] / columns["unit"]
    every = [slice(int(first), int(last)) for first, last in pairwise(passes)]
    costs = [float(cost[one].mean()) for one in every]
    return {
        "steps": len(cost),
        "steps_per_pass": every[0].stop,
        "memory": float(memory.mean()),
        "growth": float(slope * len(memory)),
        "noise": float(2 * (memory - start - slope * place).std()),
        "speed": costs[0] / costs[-1],
        "speed_by_pass": [round(costs[0] / one, 3) for one in costs],
        **{name: [int(columns[name][one].min()) for one in (every[0], every[-1])] for name in ("threads", "files")},
        "milliseconds": float(1000 * np.median(columns["seconds"])),
    }


def complaints(measured: dict[str, Any]) -> list[str]:
    """Return what did not stay constant on a rank: nothing, if all is well."""
    found = []
    if measured["growth"] > measured["noise"] + LITTLE * measured["memory"]:
        found.append(f"memory grew by {measured['growth']:.1f} MiB, with a noise of {measured['noise']:.1f}")
    found += [
        f"{name} grew from {first} to {last}"
        for name, (first, last) in ((name, measured[name]) for name in ("threads", "files"))
        if last > first
    ]
    if measured["speed"] < 1 - SLOWER:
        found.append(f"the last pass ran at {measured['speed']:.3f} of the speed of the first")
    return [f"{measured['workers']} workers, rank {measured['rank']}: {complaint}" for complaint in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        train(arguments.workers, arguments.steps, arguments.folder)
    measured = [rank for workers in WORKERS for rank in run(workers, arguments.steps)]
    RESULTS.write_text(json.dumps({**describe("cpu", "soak"), "measured": measured}, indent=1) + "\n")
    print(json.dumps(measured, indent=1))
    sys.exit("\n".join(complaint for rank in measured for complaint in complaints(rank)) or None)


if __name__ == "__main__":
    main()
