"""Every engine trains on two processes what one process trains."""

import pytest

from support.slow import slow_but_for
from support.trainers import needs_weighted_loss
from support.worker_settings import ENGINES, assert_engine, assert_same_training, on_engine, with_config, zero


# Evaluates five conversations: on two ranks, its last batch repeats one.
TOGETHER = {
    "config": {"packing": True, "max_length": 256, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "lora": True,
    "evaluate": True,
}


@needs_weighted_loss  # whose fused head the worker keeps in float64
@pytest.mark.parametrize("engine", ENGINES)
def test_steps(assert_as_alone, engine):
    assert len(assert_as_alone(engine, {**TOGETHER, "float64": True}, 1e-13).loss) == 4


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_steps_in_float32(assert_as_alone, engine):
    assert_as_alone(engine, TOGETHER)


@pytest.mark.parametrize("engine", slow_but_for(["ddp", "zero3", "fsdp2"], ENGINES))
@pytest.mark.parametrize("accumulation", slow_but_for([3], [1, 3]))
def test_every_row_is_trained_once_in_an_epoch(assert_as_alone, engine, accumulation):
    """Seven rows, two of them without targets: in the last step of an epoch, the second rank has no row left."""
    config = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": accumulation}
    settings = {"num_rows": 7, "silent_rows": [1, 4], "config": {**config, "gradient_checkpointing": False}}
    assert len(assert_as_alone(engine, settings).loss) == (8 if accumulation == 1 else 4)


def test_loss_weights_where_a_rank_has_no_row_left(assert_as_alone):
    """Four rows per step, of five: the second rank has repeated rows only, in training and in evaluation."""
    weights = {"loss_reduction": "turn", "reasoning_weight": 0.3}
    config = {"max_steps": -1, "num_train_epochs": 2, "per_device_eval_batch_size": 4, **weights}
    settings = {"num_rows": 5, "evaluate": True, "config": config}
    assert_as_alone("ddp", settings, own={"per_device_train_batch_size": 2}, per_device_train_batch_size=4)


@pytest.mark.parametrize("engine", slow_but_for(["zero3"], ENGINES))
def test_bf16(tmp_path, workers, one_process, engine):
    """FSDP keeps more in bf16 than autocast does, the logits too."""
    settings = {"config": {"bf16": True}}
    alone = one_process(with_config(settings, per_device_train_batch_size=2))
    settings, environment = on_engine(engine, settings)
    if engine == "fsdp2":  # without a GPU, transformers takes bf16=True with use_cpu=True only, which turns FSDP off
        settings = with_config(settings, bf16=False)
        environment = {**environment, "ACCELERATE_MIXED_PRECISION": "bf16"}
    run = workers.run(tmp_path, settings, world_size=2, environment=environment)
    assert_engine(run, engine)
    assert run.loss == pytest.approx(alone.loss, rel=5e-3 if engine == "fsdp2" else 5e-4)
    assert run.grad_norm == pytest.approx(alone.grad_norm, rel=1e-2)


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bf16"])
def test_offloaded_optimizer_and_parameters(tmp_path, workers, one_process, bf16):
    device = {"device": "cpu"}
    config = zero(3, offload_optimizer=device, offload_param=device)
    settings = {"config": {"deepspeed": config, "bf16": bf16, "per_device_train_batch_size": 1}}
    run = workers.run(tmp_path, settings, world_size=2)
    assert_engine(run, "zero3")
    alone = one_process({"config": {"per_device_train_batch_size": 2}})
    if bf16:
        assert run.loss == pytest.approx(alone.loss, rel=5e-3)
    else:
        assert_same_training(run, alone)


def test_fsdp_with_parameters_in_cpu_memory(tmp_path, workers, one_process):
    settings, environment = on_engine("fsdp2", {})
    run = workers.run(tmp_path, settings, world_size=2, environment={**environment, "FSDP_OFFLOAD_PARAMS": "true"})
    assert_engine(run, "fsdp2")
    assert_same_training(run, one_process({"config": {"per_device_train_batch_size": 2}}))


def test_an_engine_that_falls_back_is_refused(tmp_path, workers):
    settings = on_engine("zero3", {})[0]
    workers.assert_refused(tmp_path, settings, "ACCELERATE_USE_CPU", environment={"ACCELERATE_USE_CPU": "true"})


def test_fsdp_that_falls_back_is_refused(tmp_path, workers):
    settings, environment = on_engine("fsdp2", {})
    settings = with_config({**settings, "fsdp_on_cpu": False}, use_cpu=True)
    workers.assert_refused(tmp_path, settings, "FSDP", environment=environment)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_trained_head_beside_an_adapter(assert_as_alone, engine):
    assert_as_alone(engine, {"adapter": "LoraConfig(modules_to_save=['lm_head', 'embed_tokens'])"})
