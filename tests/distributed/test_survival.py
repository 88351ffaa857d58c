"""Runs that are killed, told to stop, or out of disk end where the uninterrupted run ends."""

import json
import random
import shutil
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from support.chat_tokenizers import make_tokenizer
from support.slow import slow_but_for
from support.trainers import SETTINGS, as_dataset, needs_weighted_loss
from support.worker import training_conversations
from support.worker_settings import ENGINES, assert_same_training, on_engine, with_config, zero
from trl_singlepass.training.checkpoints import find_damage, last_good_checkpoint


SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3, "optim": "adamw_torch"}
LONG = {"config": {**SAVING, "max_steps": 44, "learning_rate": 1e-3, "packing": True, "max_length": 256}}
# Files of which each rank writes one.
PARTS = [
    ("fsdp2", "pytorch_model_fsdp_0/__1_0.distcp"),
    ("fsdp2", "optimizer_0/.metadata"),
    ("zero3", "*/zero_pp_rank_1_*optim_states.pt"),
]
SHORT = {"config": {**SAVING, "max_steps": 6, "learning_rate": 1e-3}}


@pytest.fixture(scope="module")
def uninterrupted(workers, tmp_path_factory):
    """What two processes train without an accident, by settings."""
    results = {}

    def train(settings, environment=None):
        key = json.dumps(settings, sort_keys=True)
        if key not in results:
            run = with_config(settings, save_strategy="no")
            results[key] = workers.run(tmp_path_factory.mktemp("whole"), run, world_size=2, environment=environment)
        return results[key]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2", "ulysses"])
def test_five_kills(tmp_path, workers, uninterrupted, engine):
    """SIGKILL of either rank, at a random moment of a step or while it saves; the other one goes down with it."""
    settings, environment = on_engine(engine, LONG)
    environment = {**environment, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    run = partial(workers.run, tmp_path, world_size=2, environment=environment)
    chance, step = random.Random(), 0
    for _ in range(5):
        step += chance.randint(1, 2)
        accident = {"kind": "SIGKILL", "step": step, "rank": chance.randint(0, 1), "delay": chance.uniform(0, 2)}
        if chance.random() < 0.3:
            accident |= {"kind": "SIGKILL in saving", "delay": 0}
        killed = run({**settings, "accident": accident}, expect_success=False)
        assert -9 in killed.codes, killed.log[-4000:]
        assert 0 not in killed.codes  # the other rank lost its connection, or was killed with it
        saved = last_good_checkpoint(tmp_path / "out")
        step = max(step, int(saved.rpartition("-")[2]) if saved else 0)
    assert step < LONG["config"]["max_steps"]
    whole = uninterrupted(settings, environment)
    resumed = run(settings)
    assert_same_training(resumed, whole, tolerance=1e-7)
    assert all(torch.equal(value, whole.parameters[name]) for name, value in resumed.parameters.items())


@pytest.mark.parametrize(
    "num_shards", [pytest.param(1, marks=pytest.mark.slow), 2], ids=["shared stream", "divided stream"]
)
def test_a_killed_stream(tmp_path, workers, uninterrupted, num_shards):
    """Two ranks pack a stream of ten rows on the fly, and are killed in the second of three passes over it."""
    settings = {**with_config(on_engine("ddp", LONG)[0], max_steps=13), "num_shards": num_shards}
    killed = {**settings, "accident": {"kind": "SIGKILL", "step": 7}}
    assert -9 in workers.run(tmp_path, killed, world_size=2, expect_success=False).codes
    assert last_good_checkpoint(tmp_path / "out").endswith(("checkpoint-6", "checkpoint-7", "checkpoint-8"))
    assert_same_training(workers.run(tmp_path, settings, world_size=2), uninterrupted(settings), tolerance=1e-7)


def test_killed_before_the_last_file_of_a_rank(tmp_path, workers):
    """The first rank, which is done with its own, does not call the checkpoint whole."""
    accident = {"kind": "SIGKILL in saving", "step": 3, "rank": 1}
    run = workers.run(
        tmp_path, {**on_engine("ddp", SHORT)[0], "accident": accident}, world_size=2, expect_success=False
    )
    assert -9 in run.codes
    assert (tmp_path / "out" / "checkpoint-3" / "rng_state_0.pth").exists()
    assert last_good_checkpoint(tmp_path / "out").endswith("checkpoint-2")


@pytest.mark.parametrize("engine", slow_but_for(["ddp"], ENGINES))
def test_told_to_stop(tmp_path, workers, uninterrupted, engine):
    """The signal reaches one rank only; all save after the same step and end well."""
    settings, environment = on_engine(engine, with_config(SHORT, save_steps=100))
    run = partial(workers.run, tmp_path, world_size=2, environment=environment)
    stopped = run({**settings, "accident": {"kind": "SIGTERM", "step": 3, "rank": 1}})
    assert "Received a signal to stop: saving a checkpoint after step" in stopped.log
    assert not hasattr(stopped, "loss")
    assert 3 <= int(last_good_checkpoint(tmp_path / "out").rpartition("-")[2]) < 6
    assert_same_training(run(settings), uninterrupted(settings, environment))


@needs_weighted_loss  # whose fused head the worker keeps in float64: Adam makes much of a rounding
def test_a_resumed_epoch_trains_every_row_once(tmp_path, workers, one_process):
    """Seven rows on two ranks: killed in the second epoch, in whose last step one rank has no row left."""
    settings = {"num_rows": 7, "float64": True, "config": {**SHORT["config"], "max_steps": -1, "num_train_epochs": 2}}
    whole = one_process(with_config(settings, save_strategy="no", per_device_train_batch_size=2))
    settings = on_engine("ddp", settings)[0]
    killed = {**settings, "accident": {"kind": "SIGKILL", "step": 6}}
    assert -9 in workers.run(tmp_path, killed, world_size=2, expect_success=False).codes
    assert_same_training(workers.run(tmp_path, settings, world_size=2), whole, tolerance=1e-10)


@needs_weighted_loss
def test_shared_rows_resume(tmp_path, workers, one_process):
    """Three rows per step: the checkpoint lies within what the ranks exchange at a time."""
    steps = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "save_steps": 2, "max_steps": 4}
    settings = {**with_config(SHORT, **steps), "float64": True}
    whole = one_process(with_config(settings, save_strategy="no"))
    settings = {**with_config(settings, deepspeed=zero(3)), "sp_size": 2}
    killed = {**settings, "accident": {"kind": "SIGKILL", "step": 3}}
    assert -9 in workers.run(tmp_path, killed, world_size=2, expect_success=False).codes
    assert last_good_checkpoint(tmp_path / "out").endswith("checkpoint-2")
    assert_same_training(workers.run(tmp_path, settings, world_size=2), whole, tolerance=1e-10)


def test_full_disk(tmp_path, workers, one_process):
    settings = with_config(SHORT, per_device_train_batch_size=2)
    run = workers.run(tmp_path, {**settings, "accident": {"kind": "full disk", "step": 4}}, expect_success=False)
    assert run.codes == [1]
    assert last_good_checkpoint(tmp_path / "out").endswith("checkpoint-3")
    resumed = workers.run(tmp_path, settings)
    assert "Skipping " in resumed.log
    assert "checkpoint-4" in resumed.log
    assert_same_training(resumed, one_process(with_config(settings, save_strategy="no")))


@pytest.fixture(scope="module")
def saved(workers, tmp_path_factory):
    """The folder of a run that saved three checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    workers.run(folder, with_config(SHORT, per_device_train_batch_size=2, max_steps=3))
    return folder / "out"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "is cut off"),
        ("optimizer.pt", "is cut off"),
        ("scheduler.pt", "is cut off"),
        ("config.json", "is cut off"),
        ("trainer_state.json", "is missing"),
        ("model.safetensors", "it has no weights"),
        ("optimizer.pt", "it has a learning rate schedule, but no optimizer"),
    ],
)
@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, saved, name, damage, has_manifest):
    shutil.copytree(saved, tmp_path / "out")
    file = tmp_path / "out" / "checkpoint-3" / name
    if not has_manifest:  # as other trainers save
        shutil.rmtree(file.parent / "manifest")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    if damage != "is cut off":
        file.unlink()
    assert damage in " ".join(find_damage(file.parent))
    assert last_good_checkpoint(tmp_path / "out").endswith("checkpoint-2")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "part"), PARTS)
def test_a_damaged_part_of_a_rank_is_passed_over(tmp_path, workers, uninterrupted, engine, part):
    settings, environment = on_engine(engine, SHORT)
    environment = {**environment, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    run = partial(workers.run, tmp_path, world_size=2, environment=environment)
    run(with_config(settings, max_steps=4))
    (file,) = (tmp_path / "out" / "checkpoint-4").glob(part)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert last_good_checkpoint(tmp_path / "out").endswith("checkpoint-3")
    resumed = run(settings)
    assert "checkpoint-4: " in resumed.log
    assert_same_training(resumed, uninterrupted(settings, environment))


def test_no_checkpoint_at_all(tmp_path):
    assert last_good_checkpoint(tmp_path / "nothing") is None


@pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")  # stock training gives these
def test_a_checkpoint_is_an_ordinary_model(tmp_path, saved):
    """transformers and TRL load it, with the stock attention; nothing in it speaks of trees."""
    checkpoint = saved / "checkpoint-3"
    config = (checkpoint / "config.json").read_text() + (checkpoint / "generation_config.json").read_text()
    assert "tree" not in config
    assert "singlepass" not in config
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.config._attn_implementation == "sdpa"
    stock = SFTTrainer(
        str(checkpoint),
        SFTConfig(str(tmp_path), **{**SETTINGS, "max_length": None}),
        train_dataset=as_dataset(training_conversations()[:2]),
        processing_class=make_tokenizer("qwen3"),
    )
    assert torch.isfinite(torch.tensor(stock.train().training_loss))
