"""Settings of the distributed worker for every engine, and the comparison of two of its runs."""

import json
from types import SimpleNamespace

import pytest
import torch


TOLERANCE = 1e-6
# How the model is wrapped, what accelerate calls the engine, and the stage of ZeRO.
ENGINES = {
    "ddp": ("DistributedDataParallel", "MULTI_CPU", None),
    "zero1": ("DeepSpeedEngine", "DEEPSPEED", 1),
    "zero2": ("DeepSpeedEngine", "DEEPSPEED", 2),
    "zero3": ("DeepSpeedEngine", "DEEPSPEED", 3),
    "fsdp2": ("FSDP", "FSDP", None),
}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def zero(stage, **settings):
    """Return a DeepSpeed configuration, in which ZeRO-3 shards small parameters as it shards large ones."""
    of_zero3 = {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        # DeepSpeed's own Adam for offloaded parameters would be compiled at run time.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **(of_zero3 if stage == 3 else {}), **settings},
    }


def with_config(settings, **config):
    """Return settings with additional arguments for the trainer's config."""
    return {**settings, "config": {**settings.get("config", {}), **config}}


def on_engine(name, settings):
    """Return settings and environment variables that run the same training on an engine, one row per rank."""
    settings = with_config(settings, per_device_train_batch_size=1)
    if name == "ddp":
        return settings, {}
    if name == "fsdp2":
        return {**with_config(settings, use_cpu=False, ddp_backend="gloo"), "fsdp_on_cpu": True}, FSDP2
    if name == "ulysses":  # both ranks share each of two rows
        accumulation = 2 * settings["config"].get("gradient_accumulation_steps", 1)
        settings = with_config(settings, deepspeed=zero(3), gradient_accumulation_steps=accumulation)
        return {**settings, "sp_size": 2}, {}
    return with_config(settings, deepspeed=zero(int(name[-1]))), {}


def assert_engine(run, engine, world_size=2):
    """Assert that no launch silently fell back to another engine, or to fewer processes."""
    wrapped, kind, stage = ENGINES["zero3" if engine == "ulysses" else engine]
    assert run.world_size == world_size
    assert (run.distributed_type, run.zero_stage) == (kind, stage)
    assert run.engine.startswith(wrapped)


def read_result(path):
    """Return the result that a worker wrote, or an empty one if it did not get that far."""
    if not path.with_suffix(".json").exists():
        return SimpleNamespace()
    result = json.loads(path.with_suffix(".json").read_text())
    return SimpleNamespace(**result, parameters=torch.load(path.with_suffix(".pt")))


def assert_same_training(ours, theirs, tolerance=TOLERANCE, rel=None):
    """Assert that two runs have the same losses, gradient norms and parameters; `rel` is for all but the last."""
    assert ours.loss == pytest.approx(theirs.loss, rel=rel or tolerance)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=rel or 10 * tolerance)
    for own, other in zip(ours.by_turn, theirs.by_turn, strict=True) if rel is None else ():
        assert own == pytest.approx(other, rel=tolerance)
    assert ours.parameters.keys() == theirs.parameters.keys()
    for name, value in theirs.parameters.items():
        assert float((value.double() - ours.parameters[name].double()).abs().max()) <= tolerance, name
