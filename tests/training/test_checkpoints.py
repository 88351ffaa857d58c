"""Manifests of checkpoints: what two ranks wrote, and each way in which a checkpoint may differ from it."""

import json
import shutil
from types import SimpleNamespace

import pytest

from trl_singlepass.training.checkpoints import (
    _read,
    _write,
    add_state_to_manifest,
    find_changes,
    resume_counts,
    write_manifest,
)
from trl_singlepass.training.metrics import TokenCounts


OF_RANKS = [
    "rng_state_{}.pth",
    "global_step4/bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt",
    "pytorch_model_fsdp_0/__{}_0.distcp",
]
SHARED = ["model.safetensors", "config.json", "global_step4/mp_rank_00_model_states.pt", "token_counts.json"]


class Ranks:
    """Trainers of two ranks, without training: files are a few bytes, and ranks take turns."""

    def __init__(self):
        self.ranks = []
        for rank in range(2):
            trainer = SimpleNamespace(
                args=SimpleNamespace(should_save=rank == 0, process_index=rank, world_size=2),
                state=SimpleNamespace(global_step=0),
                accelerator=SimpleNamespace(wait_for_everyone=lambda: None),
                _total_train_tokens=0,
            )
            self.ranks.append(trainer)

    def save(self, folder, step):
        """Save a checkpoint; rank 1 is done first, so that rank 0 finds its manifest."""
        folder = folder / f"checkpoint-{step}"
        for name in [*SHARED, *(name.format(rank) for name in OF_RANKS for rank in range(2))]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(f"{name} of step {step}".encode())
        for trainer in reversed(self.ranks):
            trainer.state.global_step = step
            write_manifest(trainer, TokenCounts(), str(folder))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        for trainer in self.ranks:
            add_state_to_manifest(trainer, str(folder))
        return folder


@pytest.fixture
def checkpoint(tmp_path):
    ranks = Ranks()
    ranks.save(tmp_path, 3)
    folder = ranks.save(tmp_path, 4)
    assert find_changes(folder) == ()
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*SHARED, "trainer_state.json", *(name.format(0) for name in OF_RANKS)])
def test_a_flipped_bit_is_found(checkpoint, name):
    flip(checkpoint / name)
    assert f"{name} has other bytes than rank 0 wrote" in find_changes(checkpoint)


@pytest.mark.parametrize("name", [name.format(1) for name in OF_RANKS])
def test_each_rank_answers_for_its_files(checkpoint, name):
    flip(checkpoint / name)
    assert find_changes(checkpoint) == (f"{name} has other bytes than rank 1 wrote",)
    (checkpoint / name).write_bytes(b"")
    (change,) = find_changes(checkpoint)
    assert change.startswith(f"{name}, which rank 1 wrote, is cut off at 0 of")
    (checkpoint / name).unlink()
    assert find_changes(checkpoint) == (f"{name}, which rank 1 wrote, is missing",)


@pytest.mark.parametrize("name", ["ranks.json", "rank_0.json", "rank_1.json"])
@pytest.mark.parametrize("damage", [flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"{")])
def test_a_damaged_manifest_is_damage(checkpoint, name, damage):
    damage(checkpoint / "manifest" / name)
    assert find_changes(checkpoint) == (f"manifest/{name} is missing or damaged",)


def test_mixed_steps_are_named(checkpoint):
    older = checkpoint.parent / "checkpoint-3"
    shutil.copy(older / "manifest" / "rank_1.json", checkpoint / "manifest" / "rank_1.json")
    assert "it mixes steps: the files of rank 1 are of step 3, others of 4" in find_changes(checkpoint)
    shutil.copy(older / "trainer_state.json", checkpoint / "trainer_state.json")
    assert "it mixes steps: trainer_state.json is of step 3, other files of 4" in find_changes(checkpoint)


def test_a_manifest_of_sizes_alone_is_read(checkpoint):
    """As a run of 0.1.0 left it that was killed soon after it had saved."""
    for path in checkpoint.glob("manifest/rank_*.json"):
        own = _read(path)
        for entry in own["files"].values():
            del entry["sha256"]
        _write(path, own)
    flip(checkpoint / "rng_state_1.pth")
    assert find_changes(checkpoint) == ()
    (checkpoint / OF_RANKS[1].format(1)).write_bytes(b"short")
    (change,) = find_changes(checkpoint)
    assert change.startswith(f"{OF_RANKS[1].format(1)}, which rank 1 wrote, is cut off at 5 of")


def test_files_of_more_ranks_from_an_earlier_run_belong_to_nobody_else(checkpoint):
    (checkpoint / "manifest" / "rank_7.json").write_text("{}")
    assert find_changes(checkpoint) == ()


def test_a_changed_checkpoint_is_not_resumed(checkpoint):
    flip(checkpoint / "model.safetensors")
    trainer = SimpleNamespace(_total_train_tokens=0)
    with pytest.raises(ValueError, match=r"cannot be resumed: model.safetensors has other.*last_good_checkpoint"):
        resume_counts(trainer, TokenCounts(), str(checkpoint))
