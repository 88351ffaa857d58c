"""Two ranks train rows with images as one process does, where only one of them has images to encode."""

import pytest

from support.worker_settings import assert_same_training, on_engine, with_config


ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
# Rows with images stand in even places, text in odd ones: the second rank never shows an image of its own.
IMAGES = {"image_family": "qwen3_vl", "config": {"max_steps": 4, "max_length": None}}
EVERYWHERE = r".*(q_proj|v_proj|qkv|linear_fc1)"
CASES = {
    "plain": {},
    "lora on the language model": {"lora": r".*language_model.*(q_proj|v_proj)"},
    "lora everywhere": {"lora": EVERYWHERE},
    "frozen encoder": {"frozen_encoder": True},
    "checkpointing": {"config": {**IMAGES["config"], "activation_checkpointing": True}},
    "gemma": {"image_family": "gemma3"},
}
DEFAULT = {("ddp", "plain"), ("zero3", "plain"), ("fsdp2", "plain")}


@pytest.mark.parametrize(
    ("engine", "case"),
    [
        pytest.param(engine, case, marks=() if (engine, case) in DEFAULT else pytest.mark.slow)
        for engine in ENGINES
        for case in CASES
    ],
)
def test_only_one_rank_has_images(tmp_path, workers, one_process, engine, case):
    settings = {**IMAGES, "float64": True, **CASES[case]}
    alone = one_process(with_config(settings, per_device_train_batch_size=2))
    assert len(alone.loss) == 4
    settings, environment = on_engine(engine, settings)
    if (engine, case) == ("fsdp2", "gemma"):  # accelerate looks for a pooling head that Gemma 3's encoder lacks
        environment = {**environment, "FSDP_TRANSFORMER_CLS_TO_WRAP": "Gemma3DecoderLayer,SiglipEncoderLayer"}
    run = workers.run(tmp_path, settings, world_size=2, environment=environment)
    assert run.world_size == 2
    assert_same_training(run, alone, 1e-13)
