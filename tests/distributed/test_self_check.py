"""
Planted layers are found on every engine, on all ranks together, and no parameter has changed by then; a loss of one's
own trains there what the trainer's own trains.
"""

import pytest
import torch

from support.planted_layers import PLANTED
from support.slow import slow_but_for
from support.worker_settings import ENGINES, assert_engine, assert_same_training, on_engine, with_config


DEFAULT = [("zero3", "TokenShift"), ("fsdp2", "NGramEmbedding")]
# Every layer where the engine shards the model; elsewhere, one that a gradient finds and one that it does not.
CASES = [
    (engine, name)
    for engine in ENGINES
    for name in (PLANTED if engine in ("zero3", "fsdp2") else ("TokenShift", "NGramEmbedding"))
]


def assert_refused(run, alone, name):
    assert name in run.refused
    assert run.loss == []
    assert run.parameters.keys() == alone.parameters.keys()
    for key, value in run.parameters.items():
        assert torch.equal(value, alone.parameters[key]), key


@pytest.mark.parametrize(("engine", "name"), slow_but_for(DEFAULT, CASES))
def test_a_planted_layer_stops_all_ranks(tmp_path, workers, one_process, engine, name):
    alone = one_process(with_config({"planted": name}, per_device_train_batch_size=2))
    assert_refused(run_on(engine, {"planted": name}, tmp_path, workers), alone, name)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_a_layer_that_acts_on_long_rows_stops_all_ranks(tmp_path, workers, engine):
    run = run_on(engine, {"planted": "PoolsLongRows"}, tmp_path, workers)
    assert "training mode" in run.refused
    assert run.loss == []


def run_on(engine, settings, tmp_path, workers):
    settings, environment = on_engine(engine, settings)
    run = workers.run(tmp_path, settings, world_size=2, environment=environment)
    assert_engine(run, engine)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_that_mixes_tokens_stops_all_ranks(tmp_path, workers, engine):
    pytest.importorskip("peft", minversion="0.21")
    # FSDP2 does not shard the factors that layers share in Lily, in stock training either.
    adapter = "ShadowConfig" if engine == "fsdp2" else "LilyConfig"
    run = run_on(engine, {"adapter": adapter}, tmp_path, workers)
    assert adapter in run.refused
    assert run.loss == []


@pytest.mark.parametrize("engine", slow_but_for(["zero3"], ENGINES))
def test_an_adapter_that_starts_at_zero_is_measured_and_trained_as_alone(tmp_path, workers, one_process, engine):
    """The check fills its zeros on every rank, and takes the numbers out again."""
    alone = one_process(with_config({"lora": True}, per_device_train_batch_size=2, self_check=False))
    run = run_on(engine, {"lora": True}, tmp_path, workers)
    assert "Checked" in run.log
    assert run.loss == pytest.approx(alone.loss, rel=1e-5)


@pytest.mark.parametrize("engine", slow_but_for(["fsdp2"], ENGINES))
def test_a_loss_of_ones_own_runs_on_the_tree(tmp_path, workers, one_process, engine):
    """With gradient checkpointing, which is TRL's default."""
    own = {"config": {"log_turn_metrics": False}}
    alone = one_process(with_config(own, per_device_train_batch_size=2))
    run = run_on(engine, {**own, "trainer": "own loss"}, tmp_path, workers)
    assert_same_training(run, alone, 1e-5)
