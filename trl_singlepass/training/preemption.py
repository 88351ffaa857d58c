"""Runs that survive: save and stop when a scheduler says so, and find the last checkpoint that is whole."""

from __future__ import annotations

import json
import signal
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, logging
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PreemptionCallback(TrainerCallback):
    """
    Saves a checkpoint and stops at the end of the step in which a signal reaches any rank.

    The ranks agree on the step: each hears of the signal at its own time, and ranks that save after different steps
    would wait for each other forever. This is what `enable_jit_checkpoint=True` of transformers leaves open, which is
    for one process.

    Args:
        signals (`Sequence[signal.Signals]`, *optional*, defaults to `(SIGTERM, SIGUSR1)`):
            Signals that ask to stop.

    Example:

    ```python
    preemption = PreemptionCallback()
    trainer = SinglePassSFTTrainer(..., callbacks=[preemption])
    trainer.train(resume_from_checkpoint=last_good_checkpoint(args.output_dir))
    if preemption.was_preempted:
        sys.exit(0)  # the scheduler starts the run again
    ```
    """

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS) -> None:
        self.signals = tuple(signals)
        self.was_preempted = False
        self._received = False
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen to the signals."""
        self._previous = {number: signal.signal(number, self._receive) for number in self.signals}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask all ranks; save and stop if one of them was told to."""
        if not self._any_rank_received(args.device):
            return
        self.was_preempted = True
        control.should_save = control.should_training_stop = True
        if state.is_world_process_zero:
            logger.warning(f"Told to stop: saving a checkpoint after step {state.global_step}.")

    def _any_rank_received(self, device: torch.device) -> bool:
        if not torch.distributed.is_initialized():
            return self._received
        received = torch.tensor(int(self._received), device=device)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        return bool(received)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def last_good_checkpoint(output_dir: str | Path) -> str | None:
    """
    Return the newest checkpoint of a run that is whole: what `resume_from_checkpoint` should be.

    A run that was killed while saving, or whose disk was full, leaves a checkpoint that cannot be loaded. Each that is
    passed over is named in the log with the reason. Of several processes, the first looks and tells the others.

    Args:
        output_dir (`str` or `pathlib.Path`):
            The run's `output_dir`.

    Returns:
        `str` or `None`: Path of the checkpoint, `None` if there is none to resume from.
    """
    if not torch.distributed.is_initialized():
        return _newest_whole(Path(output_dir))
    found = [_newest_whole(Path(output_dir)) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def checkpoint_to_resume(setting: str | bool | None, output_dir: str | Path) -> str | None:
    """
    Return the checkpoint that `resume_from_checkpoint` of a configuration means.

    Args:
        setting (`str` or `bool`, *optional*):
            A path, or `"auto"` or `"true"` for [`last_good_checkpoint`].
        output_dir (`str` or `pathlib.Path`):
            The run's `output_dir`.

    Returns:
        `str` or `None`: Path of the checkpoint, `None` to start anew.
    """
    word = str(setting).lower()
    if word in ("auto", "true"):
        return last_good_checkpoint(output_dir)
    return None if word in ("none", "false", "") else str(setting)


def _newest_whole(output_dir: Path) -> str | None:
    folders = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name[11:].isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name[11:]), reverse=True):
        damage = next(damages(folder), None)
        if damage is None:
            return str(folder)
        logger.warning(f"Passing over {folder}: {damage}.")
    return None


def damages(checkpoint: Path) -> Iterator[str]:
    """
    Yield what is wrong with a checkpoint.

    Args:
        checkpoint (`pathlib.Path`):
            Folder of the checkpoint.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    if checkpoint / "trainer_state.json" not in files:  # written last
        yield "it was not saved to its end, trainer_state.json is missing"
    for path in files:
        damage = _CHECKS[path.suffix](path) if path.suffix in _CHECKS else None
        if damage:
            yield f"{path.relative_to(checkpoint)} {damage}"
    for tag in checkpoint.glob("latest"):  # DeepSpeed's
        if not any((checkpoint / tag.read_text().strip()).glob("*.pt")):
            yield f"{tag.read_text().strip()}, the state of DeepSpeed, is missing"
    for folder in sorted({path.parent for path in files if path.suffix == ".distcp"}):
        damage = _damage_of_shards(folder)
        if damage:
            yield f"{folder.name} {damage}"
    if not _any_is_like(_WEIGHTS, files):
        yield "it has no weights"
    if checkpoint / "scheduler.pt" in files and not _any_is_like(_OPTIMIZER, files):
        yield "it has a learning rate schedule, but no optimizer"


def _any_is_like(patterns: Sequence[str], files: Sequence[Path]) -> bool:
    return any(path.match(pattern) for path in files for pattern in patterns)


def _damage_of_json(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return "is cut off"
    parts = set(content["weight_map"].values()) if path.name.endswith(".index.json") else set()
    missing = sorted(part for part in parts if not (path.parent / part).exists())
    return f"names {missing[0]}, which is missing" if missing else None


def _damage_of_safetensors(path: Path) -> str | None:
    """Compare the size of a file with what its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 + header_size:
            return "is cut off"
        try:
            header = json.loads(file.read(header_size))
        except ValueError:
            return "has a broken header"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return None if size == 8 + header_size + max(ends, default=0) else "is cut off"


def _damage_of_torch_file(path: Path) -> str | None:
    """Read a file of `torch.save`, which is a zip archive with checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except zipfile.BadZipFile:
        return "is cut off"
    return None if broken is None else f"has wrong bytes in {broken}"


def _damage_of_shards(folder: Path) -> str | None:
    """Compare the sizes of FSDP's files with their index, which is written last."""
    if not (folder / ".metadata").exists():
        return "has no .metadata, it was not saved to its end"
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # not in every build of PyTorch

    try:
        index = FileSystemReader(folder).read_metadata()
    except Exception as error:  # pickle documents no end of them
        return f"has a .metadata that cannot be read ({type(error).__name__})"
    for entry in (index.storage_data or {}).values():
        file = folder / entry.relative_path
        if not file.exists():
            return f"names {file.name}, which is missing"
        if file.stat().st_size < entry.offset + entry.length:
            return f"has a {file.name} that is cut off"
    return None


# Of transformers, FSDP and DeepSpeed.
_WEIGHTS = (
    "*.safetensors",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "pytorch_model*/*.distcp",
    "*model_states.pt",
)
_OPTIMIZER = ("optimizer.pt", "optimizer*.bin", "optimizer*/*.distcp", "*optim_states.pt")
_CHECKS = {
    ".json": _damage_of_json,
    ".safetensors": _damage_of_safetensors,
    **dict.fromkeys((".pt", ".pth", ".bin"), _damage_of_torch_file),
}
