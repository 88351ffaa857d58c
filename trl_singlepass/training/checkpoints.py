"""
Checkpoints: which one a run resumes from, what is damaged, and the manifest by which damage is found.

    checkpoint-100/manifest/ranks.json     step, and the ranks whose files belong to the checkpoint
    checkpoint-100/manifest/rank_0.json    step, and the size and hash of each file of rank 0

A run that was killed while saving leaves a checkpoint that cannot be loaded. The Trainer writes `trainer_state.json`
last, which marks a checkpoint as complete; the manifest is written before, and gets the hash of that file after it.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments, logging
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DPOTrainer, SFTTrainer

from .metrics import TokenCounts


logger = logging.get_logger(__name__)

# File names of transformers, FSDP and DeepSpeed.
_WEIGHTS = (
    "*.safetensors",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "pytorch_model*/*.distcp",
    "*model_states.pt",
)
_OPTIMIZER = ("optimizer.pt", "optimizer*.bin", "optimizer*/*.distcp", "*optim_states.pt")
# Files of which each rank writes its own; all others are written by the rank that saves the model.
_OF_RANK = re.compile(r"rng_state_(\d+)\.pth|\w*zero_pp_rank_(\d+)_\w+\.pt|__(\d+)_\d+\.distcp")
_MANIFEST = "manifest"
_RANKS = f"{_MANIFEST}/ranks.json"
_READERS = 8  # files hashed at the same time


def last_good_checkpoint(output_dir: str | Path) -> str | None:
    """
    Return the newest intact checkpoint of a run, to pass as `resume_from_checkpoint`.

    Damaged checkpoints are skipped, and the log says what is wrong with each. With several processes, the first one
    searches and tells the others.

    Args:
        output_dir (`str` or `pathlib.Path`):
            The run's `output_dir`.

    Returns:
        `str` or `None`: Path of the checkpoint, `None` if there is none to resume from.
    """

    def newest_intact() -> str | None:
        paths = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        folders = [path for path in paths if path.name[11:].isdecimal()]
        for folder in sorted(folders, key=lambda path: int(path.name[11:]), reverse=True):
            damage = next(find_damage(folder), None)
            if damage is None:
                return str(folder)
            logger.warning(f"Skipping {folder}: {damage}.")
        return None

    return _on_first_rank(newest_intact)


def _on_first_rank(search: Callable[[], str | None]) -> str | None:
    if not torch.distributed.is_initialized():
        return search()
    found = [search() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def resume_counts(trainer: SFTTrainer | DPOTrainer, counts: TokenCounts, checkpoint: str | None) -> None:
    """Continue the counts of tokens of a checkpoint; a file that is not as its manifest says raises `ValueError`."""
    if checkpoint is None:
        return
    damage = _on_first_rank(lambda: next(iter(find_changes(Path(checkpoint))), None))
    if damage is not None:
        raise _not_resumable(checkpoint, damage)
    trainer._total_train_tokens = counts.restore(checkpoint, trainer._total_train_tokens)


def check_state(checkpoint: str) -> None:
    """Raise `ValueError` if the state of a checkpoint is no JSON; the Trainer, which reads it, names no file."""
    path = Path(checkpoint) / TRAINER_STATE_NAME
    damage = _check_json(path) if path.is_file() else None
    if damage is not None:
        raise _not_resumable(checkpoint, f"{path.name} {damage}")


def _not_resumable(checkpoint: str, damage: str) -> ValueError:
    return ValueError(
        f"{checkpoint} cannot be resumed: {damage}. Resume from the newest intact checkpoint instead: "
        "resume_from_checkpoint=last_good_checkpoint(output_dir), or --resume_from_checkpoint auto."
    )


def checkpoint_to_resume(setting: str | bool | None, output_dir: str | Path) -> str | None:
    """Return the checkpoint that a setting names: a path, or `"auto"` or `"true"` for [`last_good_checkpoint`]."""
    word = str(setting).lower()
    if word in ("auto", "true"):
        return last_good_checkpoint(output_dir)
    return None if word in ("none", "false", "") else str(setting)


# What is damaged -----------------------------------------------------------------------------------------------------


def find_damage(checkpoint: Path) -> Iterator[str]:
    """Yield each problem that would keep a checkpoint from loading, as the end of a sentence about it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    if checkpoint / TRAINER_STATE_NAME not in files:
        yield f"saving did not finish, {TRAINER_STATE_NAME} is missing"
    yield from find_changes(checkpoint)
    hashed = {name for _, name, entry in _read_manifest(checkpoint)[1] if "sha256" in entry}
    for path in files:
        name = path.relative_to(checkpoint).as_posix()
        damage = None if name in hashed or path.suffix not in _FILE_CHECKS else _FILE_CHECKS[path.suffix](path)
        if damage:
            yield f"{name} {damage}"
    for tag in checkpoint.glob("latest"):  # DeepSpeed's
        if not any((checkpoint / tag.read_text().strip()).glob("*.pt")):
            yield f"{tag.read_text().strip()}, DeepSpeed's state, is missing"
    for folder in sorted({path.parent for path in files if path.suffix == ".distcp"}):
        if damage := _check_shards(folder):
            yield f"{folder.name} {damage}"
    has_weights, has_optimizer = (
        any(path.match(pattern) for path in files for pattern in patterns) for patterns in (_WEIGHTS, _OPTIMIZER)
    )
    if not has_weights:
        yield "it has no weights"
    if checkpoint / "scheduler.pt" in files and not has_optimizer:
        yield "it has a learning rate schedule, but no optimizer"


def _check_json(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return "is cut off or corrupt"
    parts = set(content["weight_map"].values()) if path.name.endswith(".index.json") else set()
    missing = sorted(part for part in parts if not (path.parent / part).exists())
    return f"lists {missing[0]}, which is missing" if missing else None


def _check_safetensors(path: Path) -> str | None:
    """`safe_open` compares the size of the file with its header, and reads no tensor."""
    try:
        with safe_open(path, framework="pt"):
            return None
    except SafetensorError as error:
        return f"is cut off or corrupt ({error})"


def _check_torch_file(path: Path) -> str | None:
    """`torch.save` writes a zip archive with checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except zipfile.BadZipFile:
        return "is cut off"
    return None if broken is None else f"has corrupt bytes in {broken}"


def _check_shards(folder: Path) -> str | None:
    """Compare the sizes of FSDP's files with their index, which is written last."""
    if not (folder / ".metadata").exists():
        return "has no .metadata, saving did not finish"
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # not in every build of PyTorch

    try:
        index = FileSystemReader(folder).read_metadata()
    except Exception as error:  # unpickling may raise anything
        return f"has a .metadata that cannot be read ({type(error).__name__})"
    for entry in (index.storage_data or {}).values():
        file = folder / entry.relative_path
        if not file.exists():
            return f"lists {file.name}, which is missing"
        if file.stat().st_size < entry.offset + entry.length:
            return f"has a {file.name} that is cut off"
    return None


_FILE_CHECKS: dict[str, Callable[[Path], str | None]] = {
    ".json": _check_json,
    ".safetensors": _check_safetensors,
    **dict.fromkeys((".pt", ".pth", ".bin"), _check_torch_file),
}


# The manifest --------------------------------------------------------------------------------------------------------


def write_manifest(trainer: SFTTrainer | DPOTrainer, counts: TokenCounts, checkpoint: str) -> None:
    """Write counts of tokens, and the sizes and hashes of all files so far, once every rank has written its own."""
    folder, step, args = Path(checkpoint), trainer.state.global_step, trainer.args
    if args.should_save:
        counts.save(checkpoint, trainer._total_train_tokens)
    (folder / _MANIFEST).mkdir(parents=True, exist_ok=True)
    trainer.accelerator.wait_for_everyone()  # until then, a file may be another rank's, and half written
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    own = [name for name in names if not name.startswith(_MANIFEST) and _is_own(Path(name).name, args)]
    _write(folder / _of_rank(args.process_index), {"step": step, "files": _entries(folder, own)})
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        # Without a shared file system, those of this node.
        ranks = [rank for rank in range(args.world_size) if (folder / _of_rank(rank)).exists()]
        _write(folder / _RANKS, {"step": step, "ranks": ranks})


def add_state_to_manifest(trainer: SFTTrainer | DPOTrainer, checkpoint: str) -> None:
    """Add the state of the Trainer, which it has just written, to the manifest of a checkpoint."""
    if trainer.args.should_save:
        path = Path(checkpoint, _of_rank(trainer.args.process_index))
        own = _read(path)
        _write(path, {**own, "files": own["files"] | _entries(Path(checkpoint), [TRAINER_STATE_NAME])})


def _is_own(name: str, args: TrainingArguments) -> bool:
    match = _OF_RANK.fullmatch(name)
    rank = int(next(filter(None, match.groups()))) if match else -1
    return rank == args.process_index if 0 <= rank < args.world_size else bool(args.should_save)


def _entries(folder: Path, names: Sequence[str]) -> dict[str, dict[str, int | str]]:
    sizes = [(folder / name).stat().st_size for name in names]
    hashes = _hashes(folder / name for name in names)
    return {name: {"size": size, "sha256": hash} for name, size, hash in zip(names, sizes, hashes, strict=True)}


def find_changes(checkpoint: Path) -> tuple[str, ...]:
    """Return all differences between a checkpoint and its manifest, if it has one; untouched files are read once."""
    if not (checkpoint / _MANIFEST).is_dir():
        return ()
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return _find_changes(checkpoint, tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@cache
def _find_changes(checkpoint: Path, files: tuple[tuple[Path, int, int], ...]) -> tuple[str, ...]:
    changes, listed = _read_manifest(checkpoint)
    sizes = {path: size for path, size, _ in files}
    hashed: list[tuple[int, str, str]] = []
    for rank, name, entry in listed:
        size, expected = sizes.get(checkpoint / name), entry["size"]
        if size == expected:
            if "sha256" in entry:  # up to 0.1.0, hashes were written after a checkpoint was complete
                hashed.append((rank, name, entry["sha256"]))
            continue
        change = f"has {size} bytes instead of {expected}"
        if size is None or size < expected:
            change = "is missing" if size is None else f"is cut off at {size} of {expected} bytes"
        changes.append(f"{name}, which rank {rank} wrote, {change}")
    found = _hashes(checkpoint / name for _, name, _ in hashed)
    for (rank, name, expected), digest in zip(hashed, found, strict=True):
        if digest != expected:
            changes.append(f"{name} has other bytes than rank {rank} wrote")
    return tuple(changes)


def _read_manifest(checkpoint: Path) -> tuple[list[str], list[tuple[int, str, dict[str, Any]]]]:
    """Return what is wrong with the manifest of a checkpoint, and the rank, name, size and hash of each file in it."""
    index = _read(checkpoint / _RANKS)
    if index is None:
        return [f"{_RANKS} is missing or damaged"], []
    changes, listed, step = [], [], index["step"]
    state = checkpoint / TRAINER_STATE_NAME
    is_readable = state.is_file() and not _check_json(state)
    saved = json.loads(state.read_text("utf-8")).get("global_step") if is_readable else None
    if saved not in (None, step):
        changes.append(f"it mixes steps: {TRAINER_STATE_NAME} is of step {saved}, other files of {step}")
    for rank in index["ranks"]:
        own = _read(checkpoint / _of_rank(rank))
        if own is None:
            changes.append(f"{_of_rank(rank)} is missing or damaged")
            continue
        if own["step"] != step:
            changes.append(f"it mixes steps: the files of rank {rank} are of step {own['step']}, others of {step}")
        listed += [(rank, name, entry) for name, entry in own["files"].items()]
    return changes, listed


def _of_rank(rank: int) -> str:
    return f"{_MANIFEST}/rank_{rank}.json"


def _hashes(paths: Iterable[Path]) -> list[str]:
    def sha256(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(_READERS) as threads:
        return list(threads.map(sha256, paths))


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
