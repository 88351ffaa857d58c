"""Preference pairs of several turns train on two processes what one process trains, on every engine."""

import pytest

from support.worker_settings import TOLERANCE, in_waves, on_engine, with_config


CASES = {
    "reference": {"pairs": True},
    "adapter": {"pairs": True, "lora": True, "same_adapter": True},
    # Without the load-balancing loss, which is one of each rank's batch.
    "mixture of experts": {"pairs": True, "family": "qwen3-moe", "config": {"router_aux_loss_coef": 0.0}},
    "hybrid": {"pairs": True, "family": "qwen3_5_text", "float64": True},
}


def assert_same(run, alone):
    """Assert that two processes trained what one trained."""
    assert run.world_size == 2
    # Log-probabilities of a trajectory are in the hundreds: in float32, their differences have six digits.
    assert run.loss == pytest.approx(alone.loss, rel=1e-5)
    assert run.grad_norm == pytest.approx(alone.grad_norm, rel=1e-5)
    assert run.parameters.keys() == alone.parameters.keys()
    for name, value in alone.parameters.items():
        assert float((value - run.parameters[name]).abs().max()) <= TOLERANCE, name
    assert run.num_trained_tokens == alone.num_trained_tokens


# The ranks have different numbers of rows and waves.
IN_PARTS = {
    "rows": {**CASES["reference"], "config": {"max_row_tokens": 170}},
    "rows, adapter": {**CASES["adapter"], "config": {"max_row_tokens": 170}},
    "waves": {**CASES["reference"], "config": {"wave_tokens": 80}},
    "waves of rows, adapter": {**CASES["adapter"], "config": {"max_row_tokens": 170, "wave_tokens": 80}},
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("case", IN_PARTS)
def test_batches_of_several_parts(tmp_path, workers, one_process, engine, case):
    whole = {name: value for name, value in IN_PARTS[case].items() if name != "config"}
    settings = with_config(IN_PARTS[case], activation_checkpointing=False)
    alone = one_process(with_config(whole, activation_checkpointing=False, per_device_train_batch_size=2))
    settings, environment = on_engine(engine, settings)
    run = workers.run(tmp_path, in_waves(settings), world_size=2, environment=environment)
    assert_same(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("case", CASES)
def test_six_steps(tmp_path, workers, one_process, engine, case):
    settings = with_config(CASES[case], activation_checkpointing=False)
    alone = one_process(with_config(settings, per_device_train_batch_size=2))
    assert len(set(alone.loss)) == 6
    settings, environment = on_engine(engine, settings)
    run = workers.run(tmp_path, settings, world_size=2, environment=environment)
    assert_same(run, alone)
