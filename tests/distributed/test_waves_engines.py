"""Every engine trains in waves, unequal in number between two processes, what one process trains at once."""

import itertools

import pytest

from support.slow import slow_but_for
from support.worker_settings import with_config


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
def test_two_processes_in_waves(assert_as_alone, engine, case):
    run = assert_as_alone(engine, CASES[case], own={"wave_tokens": 32}, eval_rel=1e-5)
    assert "evaluate" not in CASES[case] or run.evaluation["eval_num_waves"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_DDP)
def test_two_processes_on_ddp(assert_as_alone, case):
    wave_tokens, settings = ON_DDP[case]
    run = assert_as_alone("ddp", with_config(settings, max_steps=3), own={"wave_tokens": wave_tokens})
    assert run.waves_by_rank[0] != run.waves_by_rank[1]
