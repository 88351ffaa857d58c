"""GRPO and RLOO on trees train on two processes what TRL's trainers train there, from the same completions."""

import pytest

from support.worker_settings import assert_engine, on_engine, with_config


STEPS = {
    "max_steps": 3,
    "num_generations": 4,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 5,
    "learning_rate": 0.05,
    "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
}
REFERENCE = {"beta": 0.04, "num_iterations": 2, "steps_per_generation": 2}
CASES = {  # settings of the run, of both trainers, and of ours alone
    "policy": ({"groups": "grpo"}, {}, {}),
    "reference": ({"groups": "grpo"}, REFERENCE, {}),
    "rloo": ({"groups": "rloo"}, REFERENCE, {}),
    "rows": ({"groups": "grpo"}, {"beta": 0.04}, {"max_row_tokens": 160}),
    "waves": ({"groups": "grpo"}, {"beta": 0.04}, {"wave_tokens": 40}),
    "requests": ({"groups": "grpo on requests"}, REFERENCE, {}),
    "requests of rloo": ({"groups": "rloo on requests"}, REFERENCE, {"max_row_tokens": 400}),
    "requests with an adapter": ({"groups": "grpo on requests", "lora": True, "same_adapter": True}, REFERENCE, {}),
    "images": ({"groups": "grpo", "screens": "qwen3_vl"}, {"beta": 0.04}, {"max_row_tokens": 160}),
}
FEW = {("ddp", "rloo"), ("fsdp2", "requests"), ("zero3", "requests of rloo")}


def assert_same(run, stock):
    """Assert that two runs drew the same completions, and moved parameters to the same place."""
    assert run.reward == stock.reward
    assert run.grad_norm == pytest.approx(stock.grad_norm, rel=1e-4)
    assert run.parameters.keys() == stock.parameters.keys()
    off = max(float((value - run.parameters[name]).abs().max()) for name, value in stock.parameters.items())
    assert off <= 1e-4 * STEPS["learning_rate"] * min(filter(None, stock.grad_norm))


def train(workers, folder, engine, settings, **config):
    folder.mkdir()
    settings, environment = on_engine(engine, settings)
    settings = with_config(settings, **{**STEPS, "per_device_train_batch_size": 4, **config})
    run = workers.run(folder, settings, world_size=2, environment=environment)
    assert_engine(run, engine)
    return run


@pytest.mark.parametrize(
    ("engine", "case"),
    [
        pytest.param(engine, case, marks=() if (engine, case) in FEW else pytest.mark.slow)
        for engine in ("ddp", "zero2", "zero3", "fsdp2")
        for case in CASES
    ],
)
def test_three_steps(tmp_path, workers, engine, case):
    settings, both, own = CASES[case]
    # With images on FSDP2, the gradient of TRL's own trainer is off by 0.5 % from the one that it has on DDP.
    reference = "ddp" if (engine, case) == ("fsdp2", "images") else engine
    stock = train(workers, tmp_path / "stock", reference, {**settings, "stock": True}, **both)
    run = train(workers, tmp_path / "ours", engine, settings, **both, **own)
    assert_same(run, stock)


@pytest.mark.parametrize(
    "engine", ["zero3", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("ddp", "fsdp2"))]
)
def test_ranks_make_rollouts_of_unequal_length(tmp_path, workers, engine):
    """A sharded model generates on all ranks, though the first one asks for fewer requests."""
    settings = {"groups": "grpo on requests", "served": True}
    run = train(workers, tmp_path / "ours", engine, settings, max_steps=2)
    assert run.requests == [1.5, 1.5]
