"""QLoRA on two processes: the frozen weights in 4 bits, sharded or not, train the adapters that one process trains."""

from types import SimpleNamespace

import pytest

from support.trainers import needs_bitsandbytes
from support.worker_settings import ENGINES, assert_same_training, on_engine, with_config, zero


NUM_ADAPTED = 4  # queries and values of two layers
CASES = {
    "plain": {},
    "packed, checkpointed": {"config": {"packing": True, "max_length": 256, "gradient_checkpointing": True}},
}


@needs_bitsandbytes
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_steps(tmp_path, workers, one_process, engine, case):
    settings = {"four_bits": True, "lora": True, "same_adapter": True, **CASES[case]}
    alone = one_process(with_config(settings, per_device_train_batch_size=2))
    settings, environment = on_engine(engine, settings)
    run = workers.run(tmp_path, settings, world_size=2, environment=environment)
    assert (run.world_size, run.distributed_type) == (2, ENGINES[engine][1])
    assert_same_training(adapters(run), adapters(alone), 1e-5)


@needs_bitsandbytes
def test_two_ranks_that_share_each_row(tmp_path, workers, one_process):
    settings = {"four_bits": True, "lora": True, "same_adapter": True}
    settings = with_config(settings, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    alone = one_process(settings)
    run = workers.run(tmp_path, {**with_config(settings, deepspeed=zero(3)), "sp_size": 2}, world_size=2)
    assert (run.world_size, run.zero_stage) == (2, 3)
    assert_same_training(adapters(run), adapters(alone), 1e-5)


def adapters(run):
    """Return the run with the parameters that train: an engine stores those in 4 bits in its own way."""
    trained = {name: value for name, value in run.parameters.items() if "lora_" in name}
    assert len(trained) == 2 * NUM_ADAPTED
    return SimpleNamespace(**{**vars(run), "parameters": trained})
