"""No rank waits for another forever: many short runs on each engine, with other data, sizes and numbers of waves."""

import random

import pytest

from support.conversations import chat
from support.worker_settings import on_engine, with_config


RUNS = 16
ENGINES = ["ddp", "zero2", "zero3", "fsdp2"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(RUNS))
def test_unequal_numbers_of_waves_end(tmp_path, workers, seed):
    draw = random.Random(seed)
    rows = [chat(draw.randint(1, 4), seed=draw.randrange(10_000)) for _ in range(4)]
    size, checkpointing = draw.choice([1, 7, 16, 33, 64, 100]), draw.random() < 0.5
    settings = with_config({"rows": rows}, max_steps=2, gradient_checkpointing=checkpointing)
    settings, environment = on_engine(ENGINES[seed % len(ENGINES)], settings)
    settings = with_config(settings, wave_tokens=size)
    run = workers.run(tmp_path, settings, world_size=2, environment=environment, timeout=300)
    assert run.world_size == 2
    assert len(run.loss) == 2
