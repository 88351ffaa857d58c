"""Ranks that share the layers of a model (tensor parallelism) train what one process trains."""

import pytest

from support.slow import slow_but_for
from support.worker_settings import assert_same_training, with_config


pytest.importorskip("transformers.distributed.configuration_utils", reason="needs DistributedConfig")

CASES = {
    "plain": {"evaluate": True},
    "checkpointing": {"config": {"gradient_checkpointing": True}},
    "all of these": {
        "config": {
            "packing": True,
            "max_length": 256,
            "loss_reduction": "turn",
            "reasoning_weight": 0.3,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "max_steps": 3,
        },
        "evaluate": True,
    },
    "lora": {"lora": True, "same_adapter": True},
    "accumulation": {"config": {"gradient_accumulation_steps": 3, "max_steps": 3}},
    "experts and sinks": {"family": "gpt-oss", "config": {"router_aux_loss_coef": 0.0}},
    "load-balancing loss": {"family": "qwen3-moe"},
}
DEFAULT = ["all of these", "lora", "experts and sinks"]


def in_parts(settings, batch_size=2, **sizes):
    """Return settings and environment under which ranks share the layers of the model."""
    settings = with_config(settings, per_device_train_batch_size=batch_size, use_cpu=False, ddp_backend="gloo")
    return {**settings, "fsdp_on_cpu": True, "divided": sizes}


@pytest.mark.parametrize("case", slow_but_for(DEFAULT, CASES))
def test_steps(tmp_path, workers, one_process, case):
    alone = one_process(with_config(CASES[case], per_device_train_batch_size=2))
    run = workers.run(tmp_path, in_parts(CASES[case], tp_size=2), world_size=2)
    assert (run.world_size, run.tp_size, len(run.loss)) == (2, 2, len(alone.loss))
    assert_same_training(run, alone)
    assert run.num_trained_tokens == alone.num_trained_tokens
    if "evaluate" in CASES[case]:
        assert run.evaluation["eval_loss"] == pytest.approx(alone.evaluation["eval_loss"], rel=1e-6)


def test_divided_experts(tmp_path, workers, one_process):
    settings = CASES["load-balancing loss"]
    run = workers.run(tmp_path, in_parts(settings, tp_size=2, ep_size=2), world_size=2)
    assert_same_training(run, one_process(with_config(settings, per_device_train_batch_size=2)))


def test_with_fsdp(tmp_path, workers, one_process):
    """Two groups of two ranks, one row per group, and an epoch whose last row has no partner."""
    settings = {"num_rows": 7, "config": {"max_steps": -1, "num_train_epochs": 1}}
    run = workers.run(tmp_path, in_parts(settings, batch_size=1, tp_size=2, fsdp_size=2), world_size=4)
    assert (run.world_size, run.tp_size, run.engine) == (4, 2, "FSDPQwen3ForCausalLM")
    assert_same_training(run, one_process(with_config(settings, per_device_train_batch_size=2)))


def test_waves_of_divided_layers_are_refused(tmp_path, workers):
    workers.assert_refused(tmp_path, in_parts({"config": {"wave_tokens": 32}}, tp_size=2), "wave_tokens")
