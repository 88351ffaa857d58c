"""Every engine trains in waves, unequal in number between two processes, what one process trains at once."""

import pytest

from support.worker_settings import assert_same_training, in_waves, on_engine, with_config, zero


ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
CASES = {
    "plain": {"evaluate": True},
    "accumulated": {"config": {"gradient_accumulation_steps": 2, "max_steps": 3, "gradient_checkpointing": True}},
}


@pytest.mark.parametrize("case", [pytest.param("plain", marks=pytest.mark.slow), "accumulated"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_in_waves(tmp_path, workers, one_process, engine, case):
    expected = one_process(with_config(CASES[case], per_device_train_batch_size=2))
    settings, environment = on_engine(engine, CASES[case])
    if engine == "zero3":  # parameters as small as these would be kept on all ranks, and never fetched
        settings = with_config(settings, deepspeed=zero(3, stage3_param_persistence_threshold=0))
    settings = in_waves(settings, wave_tokens=32)
    run = workers.run(tmp_path, settings, world_size=2, environment=environment)
    assert run.world_size == 2
    assert_same_training(run, expected)
    if "evaluate" in CASES[case]:
        assert run.evaluation["eval_loss"] == pytest.approx(expected.evaluation["eval_loss"], rel=1e-5)
        assert run.evaluation["eval_num_waves"] > 1
