"""No rank waits for another forever: many short runs on each engine, with other data, sizes and numbers of waves."""

import random

import pytest
from conversations import chat
from runs import on_engine, with_config


RUNS = 50
ENGINES = ["ddp", "zero2", "zero3", "fsdp2"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(RUNS))
def test_unequal_numbers_of_waves_end(tmp_path, nursery, seed):
    draw = random.Random(seed)
    rows = [chat(draw.randint(1, 4), seed=draw.randrange(10_000)) for _ in range(4)]
    config = {"max_steps": 2, "wave_tokens": draw.choice([1, 7, 16, 33, 64, 100]), "gradient_accumulation_steps": 1}
    config["gradient_checkpointing"] = draw.random() < 0.5
    settings, environment = on_engine(ENGINES[seed % len(ENGINES)], with_config({"rows": rows}, **config))
    run = nursery.run(tmp_path, settings, world_size=2, environment=environment, timeout=120)
    assert run.world_size == 2
    assert len(run.loss) == 2
