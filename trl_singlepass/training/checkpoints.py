"""Find the newest intact checkpoint: a run that was killed while saving leaves one that cannot be loaded."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import logging
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DPOTrainer, SFTTrainer

from .manifest import find_changes, has_hashes
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
    return _on_first_rank(lambda: _newest_intact(Path(output_dir)))


def _on_first_rank(search: Callable[[], str | None]) -> str | None:
    if not torch.distributed.is_initialized():
        return search()
    found = [search() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def resume_counts(trainer: SFTTrainer | DPOTrainer, counts: TokenCounts, checkpoint: str | None) -> None:
    """
    Continue the counts of tokens of a checkpoint, whose files must be those that were written. A missing or changed
    file raises `ValueError`. A checkpoint without a manifest, from another trainer, is not checked.
    """
    if checkpoint is None:
        return
    damage = _on_first_rank(lambda: next(iter(find_changes(Path(checkpoint))), None))
    if damage is not None:
        raise _not_resumable(checkpoint, damage)
    trainer._total_train_tokens = counts.restore(checkpoint, trainer._total_train_tokens)


def check_state(checkpoint: str) -> None:
    """
    Raise `ValueError` if the state of a checkpoint is no JSON; the Trainer, which reads it first, does not name the
    file. A folder without one is left to the Trainer.
    """
    path = Path(checkpoint) / "trainer_state.json"
    damage = _check_json(path) if path.is_file() else None
    if damage is not None:
        raise _not_resumable(checkpoint, f"{path.name} {damage}")


def _not_resumable(checkpoint: str, damage: str) -> ValueError:
    return ValueError(
        f"{checkpoint} cannot be resumed: {damage}. Resume from the newest intact checkpoint instead: "
        "resume_from_checkpoint=last_good_checkpoint(output_dir), or --resume_from_checkpoint auto."
    )


def checkpoint_to_resume(setting: str | bool | None, output_dir: str | Path) -> str | None:
    """
    Return the checkpoint that a configuration's `resume_from_checkpoint` names.

    The setting is a path, or `"auto"` or `"true"` for [`last_good_checkpoint`]. `None` means to start from scratch.
    """
    word = str(setting).lower()
    if word in ("auto", "true"):
        return last_good_checkpoint(output_dir)
    return None if word in ("none", "false", "") else str(setting)


def _newest_intact(output_dir: Path) -> str | None:
    folders = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name[11:].isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name[11:]), reverse=True):
        damage = next(find_damage(folder), None)
        if damage is None:
            return str(folder)
        logger.warning(f"Skipping {folder}: {damage}.")
    return None


def find_damage(checkpoint: Path) -> Iterator[str]:
    """
    Yield each problem that would keep a checkpoint from loading, worded as the end of a sentence about the checkpoint.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    if checkpoint / "trainer_state.json" not in files:  # the Trainer writes it last
        yield "saving did not finish, trainer_state.json is missing"
    yield from find_changes(checkpoint)
    hashed = has_hashes(checkpoint)
    for path in files:
        is_hashed = path.relative_to(checkpoint).as_posix() in hashed
        damage = None if is_hashed or path.suffix not in _FILE_CHECKS else _FILE_CHECKS[path.suffix](path)
        if damage:
            yield f"{path.relative_to(checkpoint)} {damage}"
    for tag in checkpoint.glob("latest"):  # DeepSpeed's
        if not any((checkpoint / tag.read_text().strip()).glob("*.pt")):
            yield f"{tag.read_text().strip()}, DeepSpeed's state, is missing"
    for folder in sorted({path.parent for path in files if path.suffix == ".distcp"}):
        damage = _check_shards(folder)
        if damage:
            yield f"{folder.name} {damage}"
    if not _any_match(_WEIGHTS, files):
        yield "it has no weights"
    if checkpoint / "scheduler.pt" in files and not _any_match(_OPTIMIZER, files):
        yield "it has a learning rate schedule, but no optimizer"


def _any_match(patterns: Sequence[str], files: Sequence[Path]) -> bool:
    return any(path.match(pattern) for path in files for pattern in patterns)


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
