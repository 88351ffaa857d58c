"""
Manifest of a checkpoint: the size and hash of each file, by which damage is found before a run resumes.

    checkpoint-100/manifest/ranks.json     step, and the ranks whose files belong to the checkpoint
    checkpoint-100/manifest/rank_0.json    step, and the files of rank 0

Sizes are written before the checkpoint is marked as complete. Hashes follow while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from trl import DPOTrainer, SFTTrainer

from .metrics import TokenCounts


FOLDER = "manifest"
RANKS = "ranks.json"
_READERS = 8  # files hashed at the same time
# Files of which each rank writes its own; all others are written by the rank that saves the model.
_OF_RANK = re.compile(r"rng_state_(\d+)\.pth|\w*zero_pp_rank_(\d+)_\w+\.pt|__(\d+)_\d+\.distcp")


class ManifestCallback(TrainerCallback):
    """Writes the manifest of each checkpoint of a run. It adds itself to the trainer."""

    def __init__(self, trainer: SFTTrainer | DPOTrainer) -> None:
        trainer.add_callback(self)
        self._checkpoint: Path | None = None  # whose hashes are still to be written
        self._hashing: Future[None] | None = None

    def write_sizes(self, trainer: SFTTrainer | DPOTrainer, counts: TokenCounts, checkpoint: str) -> None:
        """
        Write counts of tokens and the sizes of all files that are there so far, once every rank has written its own.
        """
        self._finish()
        if trainer.args.should_save:
            counts.save(checkpoint, trainer._total_train_tokens)
        trainer.accelerator.wait_for_everyone()  # until then, a file may be another rank's, and half written
        self._checkpoint = Path(checkpoint)
        (self._checkpoint / FOLDER).mkdir(parents=True, exist_ok=True)
        _write_rank(self._checkpoint, trainer.args, trainer.state.global_step, with_hashes=False)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            # Without a shared file system, those of this node.
            files = [self._checkpoint / _rank_file(rank) for rank in range(trainer.args.world_size)]
            ranks = [rank for rank, file in enumerate(files) if file.exists()]
            _write(self._checkpoint / FOLDER / RANKS, {"step": trainer.state.global_step, "ranks": ranks})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Start to hash the files of the checkpoint, which is complete now."""
        if self._checkpoint is None:  # weights only, from which no run resumes
            return
        thread = ThreadPoolExecutor(1, "checkpoint-hashes")
        self._hashing = thread.submit(_write_rank, self._checkpoint, args, state.global_step, with_hashes=True)
        thread.shutdown(wait=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Wait for the hashes of the last checkpoint."""
        self._finish()

    def _finish(self) -> None:
        """Wait for hashes; an error in writing them is raised here."""
        hashing, self._hashing, self._checkpoint = self._hashing, None, None
        if hashing is not None:
            hashing.result()


def _write_rank(checkpoint: Path, args: TrainingArguments, step: int, *, with_hashes: bool) -> None:
    files = {
        path.relative_to(checkpoint).as_posix(): {"size": path.stat().st_size}
        | ({"sha256": _sha256(path)} if with_hashes else {})
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.parent.name != FOLDER and _is_own(path.name, args)
    }
    _write(checkpoint / _rank_file(args.process_index), {"step": step, "files": files})


def _is_own(name: str, args: TrainingArguments) -> bool:
    match = _OF_RANK.fullmatch(name)
    rank = int(next(filter(None, match.groups()))) if match else -1
    return rank == args.process_index if 0 <= rank < args.world_size else bool(args.should_save)


def find_changes(checkpoint: Path) -> tuple[str, ...]:
    """
    Return all differences between a checkpoint and its manifest; none for a checkpoint that has no manifest.

    Files that have not been touched since the last call are not read again. Each difference is worded as the end of a
    sentence about the checkpoint.
    """
    if not (checkpoint / FOLDER).is_dir():
        return ()
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return _find_changes(checkpoint, tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@cache
def _find_changes(checkpoint: Path, files: tuple[tuple[Path, int, int], ...]) -> tuple[str, ...]:
    return tuple(_changes(checkpoint))


def _changes(checkpoint: Path) -> Iterator[str]:
    index = _read(checkpoint / FOLDER / RANKS)
    if index is None:
        yield f"{FOLDER}/{RANKS} is missing or damaged"
        return
    yield from _mixed_step(checkpoint, index["step"])
    hashes: list[tuple[int, str, str]] = []
    for rank in index["ranks"]:
        own = _read(checkpoint / _rank_file(rank))
        if own is None:
            yield f"{_rank_file(rank)} is missing or damaged"
            continue
        if own["step"] != index["step"]:
            yield f"it mixes steps: the files of rank {rank} are of step {own['step']}, others of {index['step']}"
        for name, entry in own["files"].items():
            if change := _change_of_size(checkpoint / name, entry["size"]):
                yield f"{name}, which rank {rank} wrote, {change}"
            elif "sha256" in entry:
                hashes.append((rank, name, entry["sha256"]))
    with ThreadPoolExecutor(_READERS) as threads:
        found = threads.map(lambda entry: _sha256(checkpoint / entry[1]), hashes)
        for (rank, name, expected), digest in zip(hashes, found, strict=True):
            if digest != expected:
                yield f"{name} has other bytes than rank {rank} wrote"


def _mixed_step(checkpoint: Path, step: int) -> Iterator[str]:
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # which is told elsewhere
        return
    saved = state.get("global_step", step)
    if saved != step:
        yield f"it mixes steps: {TRAINER_STATE_NAME} is of step {saved}, other files of {step}"


def has_hashes(checkpoint: Path) -> set[str]:
    """Return the names of the files of a checkpoint whose hashes [`find_changes`] compares."""
    manifests = filter(None, map(_read, (checkpoint / FOLDER).glob("rank_*.json")))
    return {name for own in manifests for name, entry in own["files"].items() if "sha256" in entry}


def _change_of_size(path: Path, expected: int) -> str | None:
    if not path.exists():
        return "is missing"
    size = path.stat().st_size
    if size == expected:
        return None
    return (
        f"is cut off at {size} of {expected} bytes" if size < expected else f"has {size} bytes instead of {expected}"
    )


def _rank_file(rank: int) -> str:
    return f"{FOLDER}/rank_{rank}.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> Any:
    """Return the content of a file of the manifest, `None` if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    own = content.pop("sha256", None) if isinstance(content, dict) else None
    return content if own == _digest(content) else None


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a file of the manifest, which is never seen half written."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({**content, "sha256": _digest(content)}, indent=1), encoding="utf-8")
    unfinished.replace(path)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
