"""Two ranks train rows with images as one process does, also where only one of them has images to encode."""

import pytest

from support.slow import slow_but_for
from support.worker_settings import TOLERANCE, assert_same_training, on_engine, with_config


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
    # A rank with fewer waves repeats two tokens, and its encoder runs when that of the others does.
    "waves": {},
    "frozen encoder in waves": {"frozen_encoder": True},
}
DEFAULT = {("ddp", "waves"), ("zero3", "plain")}


@pytest.mark.parametrize(
    ("engine", "case"),
    slow_but_for(
        DEFAULT,
        [
            (engine, case)
            for engine in ENGINES
            for case in CASES
            if engine in ("zero3", "fsdp2") or case in ("plain", "lora everywhere", "waves")
            if (engine, case) != ("zero3", "waves")  # refused
        ],
    ),
)
def test_only_one_rank_has_images(tmp_path, workers, one_process, engine, case):
    settings = {**IMAGES, "float64": True, **CASES[case]}
    alone = one_process(with_config(settings, per_device_train_batch_size=2))
    assert len(alone.loss) == 4
    settings, environment = on_engine(engine, settings)
    settings = with_config(settings, wave_tokens=12) if "waves" in case else settings
    if (engine, case) == ("fsdp2", "gemma"):  # accelerate looks for a pooling head that Gemma 3's encoder lacks
        environment = {**environment, "FSDP_TRANSFORMER_CLS_TO_WRAP": "Gemma3DecoderLayer,SiglipEncoderLayer"}
    run = workers.run(tmp_path, settings, world_size=2, environment=environment)
    assert run.world_size == 2
    assert ("waves" in case) == (max(run.num_waves, default=1) > 1)
    assert_same_training(run, alone, 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "batch_size", "accumulation"),
    [("qwen3_vl", 1, 1), ("qwen3_vl", 1, 2), ("gemma3", 4, 1)],
    ids=["one each", "accumulated", "text on one process"],
)
def test_images_of_a_processor(tmp_path, workers, one_process, family, batch_size, accumulation):
    settings = {"screens": family, "config": {"max_steps": 1, "max_length": None}}
    settings = with_config(settings, gradient_accumulation_steps=accumulation)
    alone = one_process(with_config(settings, per_device_train_batch_size=2 * batch_size))
    run = workers.run(tmp_path, with_config(settings, per_device_train_batch_size=batch_size), world_size=2)
    assert_same_training(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "case"),
    [
        ("ddp", {}),
        *((engine, {"max_row_tokens": 110}) for engine in ("ddp", "zero3", "fsdp2")),
        ("ddp", {"max_row_tokens": 110, "wave_tokens": 40}),
    ],
)
def test_pairs_with_images(tmp_path, workers, one_process, engine, case):
    """Also where one rank has a pair without an image, or more rows than the other."""
    settings = {"screens": "qwen3_vl", "pairs": True, "config": {"max_steps": 4, "max_length": None}}
    settings = with_config(settings, learning_rate=0.02, max_grad_norm=0.0)
    alone = one_process(with_config(settings, per_device_train_batch_size=2))
    settings, environment = on_engine(engine, with_config(settings, **case))
    run = workers.run(tmp_path, settings, world_size=2, environment=environment)
    for name, value in alone.parameters.items():
        assert float((run.parameters[name] - value).abs().max()) <= TOLERANCE, name
