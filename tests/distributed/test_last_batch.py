"""Rows that only fill up the last step of an epoch add nothing to the load-balancing loss of a mixture of experts."""

import pytest

from support.slow import slow_but_for
from support.trainers import needs_weighted_loss
from support.worker_settings import assert_same_training, on_engine, with_config, zero


pytestmark = needs_weighted_loss

EPOCH = {"max_steps": -1, "num_train_epochs": 1, "gradient_checkpointing": False}
SETTINGS = {"family": "qwen3-moe", "float64": True, "config": EPOCH}
# Rows, rows per batch, and batches of a rank per step. One rank of the last step repeats nothing but rows, or has new
# ones before them.
CASES = {"a row": (3, 1, 1), "part of a batch": (7, 3, 1), "a batch and a part": (5, 2, 1), "accumulation": (5, 1, 2)}


def settings_of(num_rows, batch_size, **config):
    return with_config({**SETTINGS, "num_rows": num_rows}, per_device_train_batch_size=batch_size, **config)


def assert_equal_to_one_process(run, alone, num_steps):
    assert run.world_size == 2
    assert len(run.loss) == num_steps
    assert_same_training(run, alone, tolerance=1e-13)
    assert run.aux_loss == pytest.approx(alone.aux_loss, rel=1e-6)  # computed in float32 by transformers


@pytest.mark.parametrize("case", slow_but_for(["part of a batch"], CASES))
def test_two_ranks(tmp_path, workers, one_process, case):
    num_rows, batch_size, accumulated = CASES[case]
    alone = one_process(settings_of(num_rows, batch_size, gradient_accumulation_steps=2 * accumulated))
    settings = settings_of(num_rows, batch_size, gradient_accumulation_steps=accumulated)
    assert_equal_to_one_process(workers.run(tmp_path, settings, world_size=2), alone, 2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_waves(tmp_path, workers, one_process, engine):
    alone = one_process(settings_of(3, 1, gradient_accumulation_steps=2))
    settings, environment = on_engine(engine, settings_of(3, 1, wave_tokens=32))
    assert_equal_to_one_process(workers.run(tmp_path, settings, world_size=2, environment=environment), alone, 2)


@pytest.mark.slow
def test_a_stream(tmp_path, workers, one_process):
    """The second rank runs out of rows, and gets a batch of two tokens."""
    alone = one_process(settings_of(3, 1, gradient_accumulation_steps=2))
    settings = {**settings_of(3, 1, max_steps=2), "num_shards": 1}
    assert_equal_to_one_process(workers.run(tmp_path, settings, world_size=2), alone, 2)


@pytest.mark.slow
@pytest.mark.parametrize("waves", [{}, {"wave_tokens": 32}])
def test_ranks_that_share_rows(tmp_path, workers, one_process, waves):
    alone = one_process(settings_of(7, 3, gradient_accumulation_steps=2))
    engine = {"deepspeed": zero(3), "gradient_accumulation_steps": 2}
    settings = {**settings_of(7, 3, **engine, **waves), "sp_size": 2}
    assert_equal_to_one_process(workers.run(tmp_path, settings, world_size=2), alone, 2)
