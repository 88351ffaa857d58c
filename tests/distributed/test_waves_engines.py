"""Every engine trains in waves, unequal in number between two processes, what one process trains at once."""

import itertools

import pytest

from support.slow import slow_but_for
from support.worker_settings import assert_same_training, on_engine, with_config, zero


ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
CASES = {
    "plain": {"evaluate": True},
    "accumulated": {"config": {"gradient_accumulation_steps": 2, "max_steps": 2, "gradient_checkpointing": True}},
}

# On DDP alone: waves that keep branches whole, adapters, and a search for unused parameters, which sees the last wave.
ON_DDP = {
    "kept": (100, {}),
    "kept, checkpointed": (100, {"config": {"gradient_checkpointing": True}}),
    "lora": (24, {"lora": True, "config": {"gradient_accumulation_steps": 2}}),
    "find-unused": (
        16,
        {"family": "qwen3-moe", "config": {"router_aux_loss_coef": 0.0, "ddp_find_unused_parameters": True}},
    ),
}


@pytest.mark.parametrize(
    ("engine", "case"),
    # ZeRO-1 and ZeRO-2 take gradients in the same way.
    slow_but_for(
        [(engine, "accumulated") for engine in ENGINES if engine != "zero1"], itertools.product(ENGINES, CASES)
    ),
)
def test_two_processes_in_waves(tmp_path, workers, one_process, engine, case):
    expected = one_process(with_config(CASES[case], per_device_train_batch_size=2))
    settings, environment = on_engine(engine, CASES[case])
    if engine == "zero3":  # parameters as small as these would be kept on all ranks, and never fetched
        settings = with_config(settings, deepspeed=zero(3, stage3_param_persistence_threshold=0))
    settings = with_config(settings, wave_tokens=32)
    run = workers.run(tmp_path, settings, world_size=2, environment=environment)
    assert run.world_size == 2
    assert_same_training(run, expected)
    if "evaluate" in CASES[case]:
        assert run.evaluation["eval_loss"] == pytest.approx(expected.evaluation["eval_loss"], rel=1e-5)
        assert run.evaluation["eval_num_waves"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_DDP)
def test_two_processes_on_ddp(tmp_path, workers, one_process, case):
    wave_tokens, settings = ON_DDP[case]
    settings = with_config(settings, max_steps=3)
    expected = one_process(with_config(settings, per_device_train_batch_size=2))
    settings = with_config(on_engine("ddp", settings)[0], wave_tokens=wave_tokens)
    run = workers.run(tmp_path, settings, world_size=2)
    assert run.waves_by_rank[0] != run.waves_by_rank[1]
    assert_same_training(run, expected)
