"""Training in a single pass, at once and in waves, moves parameters as stock `SFTTrainer` does on expanded samples."""

import copy
import itertools

import pytest
import trl
from packaging.version import Version

from support.slow import slow_but_for
from support.trainers import (
    CONVERSATIONS,
    adapted,
    assert_trained_alike,
    float32_model,
    logged,
    single_pass_trainer,
    train_both,
)


# What reads logits fails with the default loss before TRL 1.15, in stock training too.
WITH_LOGITS = {} if Version(trl.__version__) >= Version("1.15") else {"loss_type": "nll"}


LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")


def assert_as_stock(tmp_path, tokenizer, model, wave_tokens=None, offload_kv=False, **settings):
    """Assert that both move a model alike; return both trainers."""
    if wave_tokens is not None and Version(trl.__version__) < Version("1.16"):
        pytest.skip("waves need trl>=1.16")
    own = {"wave_tokens": wave_tokens, "offload_kv": offload_kv}
    both = train_both(tmp_path, tokenizer, model, own, **{"per_device_train_batch_size": 4, **settings})
    assert wave_tokens is None or max(logged(both[1], "num_waves")) > 1
    assert_trained_alike(*both, model, LOGGED)
    return both


# Each two of these settings meet in a fast test.
PAIRWISE = [
    *((None, 1, 1, False, False), (None, 1, 2, True, True), (None, 4, 1, True, False), (None, 4, 2, False, False)),
    *((None, 4, 1, False, True), (16, 4, 2, True, True), (100, 4, 2, False, True), (100, 4, 2, True, False)),
    (16, 4, 2, False, False),
]
ALL = [
    *itertools.product((None,), (1, 4), (1, 2), (False, True), (False, True)),
    *itertools.product((16, 100), (4,), (2,), (False, True), (False, True)),
]


@pytest.mark.parametrize(
    ("wave_tokens", "batch_size", "accumulation", "checkpointing", "lora"), slow_but_for(PAIRWISE, ALL)
)
def test_one_step(tmp_path, tokenizer, wave_tokens, batch_size, accumulation, checkpointing, lora):
    model = float32_model(tokenizer)
    model = adapted(model) if lora else model
    steps = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    assert_as_stock(tmp_path, tokenizer, model, wave_tokens, gradient_checkpointing=checkpointing, **steps)


ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-4}
# TRL's default is the other kind.
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
SETTINGS = {
    "reentrant": {**REENTRANT, "per_device_train_batch_size": 8},
    "twenty steps": {
        **ADAM,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
    },
    "reentrant, in waves": {**REENTRANT, "wave_tokens": 100},
    "keys and values on the CPU": {"offload_kv": True, "wave_tokens": 64},
    "clipped, in waves": {
        **ADAM,
        "max_grad_norm": 0.5,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "wave_tokens": 64,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(tmp_path, tokenizer, name):
    assert_as_stock(tmp_path, tokenizer, float32_model(tokenizer), **SETTINGS[name])


# Not Llama 4: see below.
FAMILIES = ["gpt-oss", "gemma2", "gemma3", "mistral-sliding"]


@pytest.mark.parametrize(
    ("family", "wave_tokens"),
    slow_but_for([("gpt-oss", None), ("gemma3", None), ("gemma3", 64)], itertools.product(FAMILIES, (None, 64))),
)
def test_one_step_of_other_families(tmp_path, tokenizer, family, wave_tokens):
    assert_as_stock(tmp_path, tokenizer, float32_model(tokenizer, family, "eager"), wave_tokens)


@pytest.mark.parametrize("wave_tokens", [None, 100])
def test_auxiliary_loss_of_a_mixture_of_experts(tmp_path, tokenizer, wave_tokens):
    model = float32_model(tokenizer, "qwen3-moe")
    both = assert_as_stock(tmp_path, tokenizer, model, wave_tokens, gradient_accumulation_steps=2, max_steps=2)
    assert logged(both[1], "aux_loss") == pytest.approx(logged(both[0], "aux_loss"), rel=1e-5)


@pytest.mark.parametrize("model_type", ["llama4_text", "phimoe"])
def test_mixtures_whose_parts_trls_fused_head_does_not_find(tmp_path, tokenizer, model_type):
    """In stock training too: there, the decoder and the number of experts are named by hand."""
    model = float32_model(tokenizer, model_type, output_router_logits=True)
    ours = single_pass_trainer(tmp_path, tokenizer, CONVERSATIONS[:2], copy.deepcopy(model), max_steps=1)
    ours.train()
    model.base_model_prefix, model.config.num_experts = "model", model.config.num_local_experts
    both = assert_as_stock(tmp_path, tokenizer, model)
    assert logged(both[1], "aux_loss")
    assert logged(ours, "aux_loss")


@pytest.mark.parametrize(
    "settings",
    # DFT scales gradients by the probability of the target, small here: a larger step makes up for it.
    [
        {"loss_type": "nll"},
        {"loss_type": "nll", "wave_tokens": 100},
        {"loss_type": "dft", "learning_rate": 10.0},
        {"loss_type": "dft", "learning_rate": 10.0, "wave_tokens": 100},
        {"label_smoothing_factor": 0.1, **WITH_LOGITS},
    ],
    ids=["nll", "nll in waves", "dft", "dft in waves", "label_smoothing"],
)
def test_losses_and_evaluation(tmp_path, tokenizer, settings):
    model = float32_model(tokenizer)
    steps = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    both = assert_as_stock(tmp_path, tokenizer, model, evaluation=CONVERSATIONS[:5], **steps, **settings)
    stock, ours = (trainer.evaluate() for trainer in both)
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert ours.get(key) == pytest.approx(stock.get(key), rel=1e-5)


@pytest.mark.parametrize(
    ("model_type", "checkpointing"),
    slow_but_for([("qwen3_5_text", True)], itertools.product(("qwen3_5_text", "lfm2", "jamba"), (False, True))),
)
def test_hybrids_in_waves(tmp_path, tokenizer, model_type, checkpointing):
    model = float32_model(tokenizer, model_type)
    assert_as_stock(tmp_path, tokenizer, model, 64, gradient_checkpointing=checkpointing)
