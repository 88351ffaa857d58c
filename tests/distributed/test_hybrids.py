"""
Recurrent layers and experts, on rows with different numbers of pieces, train on ranks what one process trains.

Layers on rows that ranks share are tried on threads, for many more models and sizes of groups:
`tests/engine/test_shared_rows.py`.
"""

import itertools

import pytest

from support.slow import slow_but_for
from support.tiny_models import KINDS
from support.trainers import needs_weighted_loss
from support.worker_settings import assert_same_training, with_config, zero


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
# Each family in the case that has everything; one of each kind in all of them. The last has heads of several sizes.
ON_ZERO3 = [
    ("zero3", family, case)
    for family in FAMILIES
    for case in CASES
    if family in (*KINDS, "qwen3_5_moe_text", "qwen3-moe") or case == "checkpointed waves"
]
UNDER_ULYSSES = ["qwen3", "qwen3_5_text", "qwen3_5_moe_text", "qwen3-moe", "gemma4_unified_text"]
DEFAULT = [("zero3", "qwen3_5_moe_text", "waves"), *(("ulysses", "qwen3-moe", case) for case in ("rows", "waves"))]
# TRL 1.16 looks for the number of experts under a name that the configuration does not have.
OWN = {"granitemoehybrid": {"router_aux_loss_coef": 0.0}}


def settings_of(family, case, **settings):
    """Return what one process trains, row by row, each with its load-balancing loss, and what ranks set besides."""
    config = {"max_steps": 2, "gradient_checkpointing": False, **CASES[case], **OWN.get(family, {})}
    own = {"wave_tokens": config.pop("wave_tokens", None)}
    return {"family": family, "float64": True, "config": config, **settings}, own


def assert_equal(assert_as_alone, engine, settings, own):
    by_row = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert len(assert_as_alone(engine, settings, 1e-13, own, **by_row).loss) == 2


@pytest.mark.parametrize(
    ("engine", "family", "case"),
    slow_but_for(DEFAULT, [*ON_ZERO3, *itertools.product(["ulysses"], UNDER_ULYSSES, CASES)]),
)
def test_two_ranks(assert_as_alone, engine, family, case):
    assert_equal(assert_as_alone, engine, *settings_of(family, case))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("engine", "family"), [("zero3", "qwen3_5_text"), ("ulysses", "qwen3_5_moe_text")])
def test_adapters_in_the_first_layer(assert_as_alone, engine, family, case):
    """Its inputs, which come from a frozen embedding, have no gradients of their own."""
    assert_equal(assert_as_alone, engine, *settings_of(family, case, lora="all-linear"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rows", "waves"])
@pytest.mark.parametrize("family", UNDER_ULYSSES)
def test_two_groups_on_zero1(tmp_path, workers, one_process, family, case):
    """Whose gradients are too large by the size of a group, in waves as well, and are corrected."""
    settings, own = settings_of(family, case)
    settings = with_config(settings, per_device_train_batch_size=1)
    alone = one_process(with_config(settings, gradient_accumulation_steps=4))
    settings = with_config(settings, gradient_accumulation_steps=2, deepspeed=zero(1), **own)
    run = workers.run(tmp_path, {**settings, "sp_size": 2}, world_size=4)
    assert (run.world_size, run.zero_stage, len(run.loss)) == (4, 1, 2)
    assert_same_training(run, alone, tolerance=1e-13)
