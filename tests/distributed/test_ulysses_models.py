"""
Hybrids and mixtures of experts under Ulysses train what one process trains, checkpointed and in several groups too.

The column of `test_matrix.py` has rows, waves, packing and adapters. Layers on rows that ranks share are tried on
threads, for many more models and sizes of groups: `tests/attention/test_shared_rows.py`,
`tests/recurrent/test_shared_rows.py`.
"""

import itertools

import pytest

from support.slow import slow_but_for
from support.trainers import needs_weighted_loss
from support.worker_settings import assert_same_training, with_config, zero


pytestmark = needs_weighted_loss  # whose fused head the worker keeps in float64

MODELS = {
    "plain": "qwen3",
    "hybrid dense": "qwen3_5_text",
    "hybrid moe": "qwen3_5_moe_text",
    "moe with auxiliary loss": "qwen3-moe",
    "heads of several sizes": "gemma4_unified_text",
}
CASES = {
    "rows": {},
    "waves": {"wave_tokens": 32},
    "lora in waves": {"lora": "all-linear", "wave_tokens": 32},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointed waves": {"wave_tokens": 32, "gradient_checkpointing": True},
}
DEFAULT = [("moe with auxiliary loss", "rows"), ("moe with auxiliary loss", "waves")]


def assert_equal_under_ulysses(folder, workers, one_process, family, case, world_size=2, stage=3):
    """Assert that ranks in pairs train what one process trains on the rows of all pairs."""
    lora, wave_tokens = case.get("lora"), case.get("wave_tokens")
    config = {name: value for name, value in case.items() if name not in ("lora", "wave_tokens")}
    settings = {"family": family, "float64": True, "config": {"max_steps": 2, "gradient_checkpointing": False}}
    settings = with_config({**settings, "lora": lora}, per_device_train_batch_size=1, **config)
    alone = one_process(with_config(settings, gradient_accumulation_steps=world_size))
    settings = with_config(settings, gradient_accumulation_steps=2, deepspeed=zero(stage))
    if wave_tokens is not None:
        settings = with_config(settings, wave_tokens=wave_tokens)
    run = workers.run(folder, {**settings, "sp_size": 2}, world_size=world_size)
    assert (run.world_size, run.zero_stage, len(run.loss)) == (world_size, stage, 2)
    assert run.num_trained_tokens == alone.num_trained_tokens
    assert run.num_tokens == alone.num_tokens
    assert_same_training(run, alone, tolerance=1e-13)


@pytest.mark.parametrize(
    ("model", "case"),
    slow_but_for(DEFAULT, itertools.product(MODELS, CASES)),
)
def test_two_ranks(tmp_path, workers, one_process, model, case):
    assert_equal_under_ulysses(tmp_path, workers, one_process, MODELS[model], CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rows", "waves"])
@pytest.mark.parametrize("model", MODELS)
def test_two_groups_on_zero1(tmp_path, workers, one_process, model, case):
    """Whose gradients are too large by the size of a group, in waves as well, and are corrected."""
    assert_equal_under_ulysses(tmp_path, workers, one_process, MODELS[model], CASES[case], world_size=4, stage=1)
