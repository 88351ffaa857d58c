"""
Preference pairs of several turns train on two processes what one process trains, on every engine; those of a single
turn train what stock trains.
"""

import json

import pytest

from support.pairs import SINGLE_TURNS
from support.worker_settings import assert_same_training, with_config


CASES = {
    "reference": {"pairs": True},
    "adapter": {"pairs": True, "lora": True, "same_adapter": True},
    # Without the load-balancing loss, which is one of each rank's batch.
    "mixture of experts": {"pairs": True, "family": "qwen3-moe", "config": {"router_aux_loss_coef": 0.0}},
    "hybrid": {"pairs": True, "family": "qwen3_5_text", "float64": True},
}


# The ranks have different numbers of rows and waves.
IN_PARTS = {
    "rows": (CASES["reference"], {"max_row_tokens": 170}),
    "rows, adapter": (CASES["adapter"], {"max_row_tokens": 170}),
    "waves": (CASES["reference"], {"wave_tokens": 80}),
    "waves of rows, adapter": (CASES["adapter"], {"max_row_tokens": 170, "wave_tokens": 80}),
}


# Log-probabilities of a trajectory are in the hundreds: in float32, their differences have six digits.
REL = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
@pytest.mark.parametrize("case", IN_PARTS)
def test_batches_of_several_parts(assert_as_alone, engine, case):
    settings, own = IN_PARTS[case]
    assert_as_alone(engine, with_config(settings, activation_checkpointing=False), own=own, rel=REL)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("case", CASES)
def test_steps(assert_as_alone, engine, case):
    run = assert_as_alone(engine, with_config(CASES[case], activation_checkpointing=False), rel=REL)
    assert len(set(run.loss)) == 4


# Model, batch size, batches per step, and whether the reference runs first.
AS_STOCK = {
    "full": ({}, 1, 2, False),
    "full, precomputed": ({}, 2, 2, True),
    "adapter": ({"adapter": "LoraConfig"}, 2, 1, False),
    "adapter, precomputed": ({"adapter": "LoraConfig"}, 1, 2, True),
    # The last batch of an epoch is incomplete, and accelerate fills it up.
    "incomplete": ({}, 3, 1, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", AS_STOCK)
def test_single_turns_train_as_stock(tmp_path, workers, case):
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in SINGLE_TURNS))
    model, batch_size, accumulation, precomputed = AS_STOCK[case]
    steps = {"max_steps": 20, "learning_rate": 0.02, "max_length": None, "gradient_accumulation_steps": accumulation}
    settings = with_config({**model, "pairs": str(tmp_path / "pairs.jsonl")}, **steps)
    settings = with_config(settings, per_device_train_batch_size=batch_size, precompute_ref_log_probs=precomputed)
    runs = []
    for is_stock in (True, False):
        folder = tmp_path / f"stock {is_stock}"
        folder.mkdir()
        runs.append(workers.run(folder, {**settings, "stock": is_stock}, world_size=2))
    assert_same_training(*runs[::-1], rel=1e-3)
    assert len(set(runs[0].loss)) > 1
