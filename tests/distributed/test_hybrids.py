"""Recurrent layers and experts, on rows with different numbers of pieces, train on ZeRO-3 what one process trains."""

import pytest

from support.slow import slow_but_for
from support.tiny_models import KINDS
from support.trainers import needs_weighted_loss
from support.worker_settings import assert_same_training, on_engine, with_config


pytestmark = needs_weighted_loss  # whose fused head the worker keeps in float64

# States at forks, with and without experts; convolutions alone; layers that run whole paths; selected tokens.
FAMILIES = [
    *("qwen3_5_text", "qwen3_5_moe_text", "nemotron_h", "lfm2", "lfm2_moe", "granitemoehybrid", "bamba", "falcon_h1"),
    *("qwen3_next", "kimi_linear", "zamba2", "jamba", "recurrent_gemma", "deepseek_v32", "qwen3-moe", "zaya"),
    "longcat_flash",
]
CASES = {
    "rows": {},
    "waves": {"wave_tokens": 32},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointed waves": {"wave_tokens": 32, "gradient_checkpointing": True},
}
DEFAULT = [("qwen3_5_moe_text", "waves")]
# Each family in the case that has everything; one of each kind in all of them.
TRIED = [
    (family, case)
    for family in FAMILIES
    for case in CASES
    if family in (*KINDS, "qwen3_5_moe_text", "qwen3-moe") or case == "checkpointed waves"
]
# TRL 1.16 looks for the number of experts under a name that the configuration does not have.
OWN = {"granitemoehybrid": {"router_aux_loss_coef": 0.0}}


def in_float64(family, **settings):
    return {"family": family, "float64": True, "config": {"max_steps": 2, "gradient_checkpointing": False}, **settings}


def assert_equal_on_zero3(folder, workers, one_process, settings, wave_tokens=None, **config):
    """Assert that two ranks train what one process trains on their rows in turn, each with its load-balancing loss."""
    one_row = {**config, "per_device_train_batch_size": 1}
    alone = one_process(with_config(settings, gradient_accumulation_steps=2, **one_row))
    settings, environment = on_engine("zero3", with_config(settings, **one_row))
    if wave_tokens is not None:
        settings = with_config(settings, wave_tokens=wave_tokens)
    run = workers.run(folder, settings, world_size=2, environment=environment)
    assert (run.world_size, run.zero_stage, len(run.loss)) == (2, 3, 2)
    assert_same_training(run, alone, tolerance=1e-13)


@pytest.mark.parametrize(
    ("family", "case"),
    slow_but_for(DEFAULT, TRIED),
)
def test_a_layer_is_gathered_as_a_whole(tmp_path, workers, one_process, family, case):
    config = {**CASES[case], **OWN.get(family, {})}
    assert_equal_on_zero3(tmp_path, workers, one_process, in_float64(family), **config)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_adapters_in_the_first_layer(tmp_path, workers, one_process, case):
    """Its inputs, which come from a frozen embedding, have no gradients of their own."""
    settings = in_float64("qwen3_5_text", lora="all-linear")
    assert_equal_on_zero3(tmp_path, workers, one_process, settings, **CASES[case])
