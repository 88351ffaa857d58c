"""Two GPUs over NCCL: every engine trains on two ranks what one process trains."""

import pytest
import torch

from support.gpu_or_cpu import DEVICE
from support.worker_settings import FSDP2, assert_same_training, on_engine, with_config, zero


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
ENGINES = ["ddp", "fsdp2", "zero3", "ulysses"]
CASES = {
    "float32": {},
    "checkpointing": {"config": {"gradient_checkpointing": True}},
    "bf16": {"config": {"bf16": True}},
}


def on_gpus(engine, settings):
    """Return settings and environment variables that run the same training on two GPUs."""
    if DEVICE == "cpu" and engine != "ulysses":
        return on_engine(engine, settings)
    settings = with_config(settings, per_device_train_batch_size=1, use_cpu=DEVICE == "cpu")
    if engine == "ulysses":
        settings = with_config(settings, deepspeed=zero(3), gradient_accumulation_steps=2)
        return {**settings, "sp_size": 2}, {}
    if engine == "zero3":
        return with_config(settings, deepspeed=zero(3)), {}
    return settings, FSDP2 if engine == "fsdp2" else {}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_steps(tmp_path, workers, one_process, engine, case):
    if DEVICE == "cpu" and (engine, case) == ("fsdp2", "bf16"):
        pytest.skip("what stands in for a GPU here has no bf16")
    settings = CASES[case]
    alone = one_process(with_config(settings, per_device_train_batch_size=2, use_cpu=DEVICE == "cpu"))
    settings, environment = on_gpus(engine, settings)
    run = workers.run(tmp_path, settings, world_size=2, environment=environment)
    assert run.world_size == 2
    assert (engine in ("zero3", "ulysses")) == (run.engine == "DeepSpeedEngine")
    if case == "bf16":  # in which DeepSpeed keeps its weights as well
        assert run.loss == pytest.approx(alone.loss, rel=5e-3)
        assert run.grad_norm == pytest.approx(alone.grad_norm, rel=2e-2)
    else:
        assert_same_training(run, alone, 1e-5)
