"""Two ranks train rows with images as one process does, also where only one of them has images to encode."""

import pytest

from support.slow import slow_but_for
from support.worker_settings import FSDP2


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
def test_only_one_rank_has_images(assert_as_alone, monkeypatch, engine, case):
    settings = {**IMAGES, "float64": True, **CASES[case]}
    own = {"wave_tokens": 12} if "waves" in case else {}
    if (engine, case) == ("fsdp2", "gemma"):  # accelerate looks for a pooling head that Gemma 3's encoder lacks
        monkeypatch.setitem(FSDP2, "FSDP_TRANSFORMER_CLS_TO_WRAP", "Gemma3DecoderLayer,SiglipEncoderLayer")
    run = assert_as_alone(engine, settings, 1e-13, own)
    assert len(run.loss) == 4
    assert ("waves" in case) == (max(run.num_waves, default=1) > 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "batch_size", "accumulation"),
    [("qwen3_vl", 1, 1), ("qwen3_vl", 1, 2), ("gemma3", 4, 1)],
    ids=["one each", "accumulated", "text on one process"],
)
def test_images_of_a_processor(assert_as_alone, family, batch_size, accumulation):
    config = {"max_steps": 1, "max_length": None, "gradient_accumulation_steps": accumulation}
    own = {"per_device_train_batch_size": batch_size}
    assert_as_alone("ddp", {"screens": family, "config": config}, own=own, per_device_train_batch_size=2 * batch_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "own"),
    [
        ("ddp", {}),
        *((engine, {"max_row_tokens": 110}) for engine in ("ddp", "zero3", "fsdp2")),
        ("ddp", {"max_row_tokens": 110, "wave_tokens": 40}),
    ],
)
def test_pairs_with_images(assert_as_alone, engine, own):
    """Also where one rank has a pair without an image, or more rows than the other."""
    config = {"max_steps": 4, "max_length": None, "learning_rate": 0.02, "max_grad_norm": 0.0}
    assert_as_alone(engine, {"screens": "qwen3_vl", "pairs": True, "config": config}, own=own, rel=1e-3)
