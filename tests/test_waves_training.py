"""Training in waves moves parameters as stock `SFTTrainer` does on the expanded samples."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chat_tokenizers import make_tokenizer
from equivalence import CONVERSATIONS, adapted, single_pass_trainer, stock_trainer
from families import tiny_model
from training import float32_model, largest_difference, logged, parameters


TOLERANCE = 1e-6

# Stock training gives these as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("qwen3")


def train_both(tmp_path, tokenizer, model, wave_tokens, evaluation=None, **settings):
    """Train copies of a model in stock and in waves; return both trainers."""
    settings = {"per_device_train_batch_size": 4, **settings}
    stock = stock_trainer(tmp_path, tokenizer, model, evaluation=evaluation, **settings)
    waves = single_pass_trainer(
        tmp_path, tokenizer, model, evaluation=evaluation, wave_tokens=wave_tokens, **settings
    )
    stock.train()
    waves.train()
    assert max(logged(waves, "num_waves")) > 1
    return stock, waves


def assert_equal(stock, waves, model, tolerance=TOLERANCE):
    """Assert that both trained alike, and that they moved far more than the tolerance."""
    assert largest_difference(stock, waves) <= tolerance
    before = dict(model.named_parameters())
    moved = max(float((value - before[name].detach()).abs().max()) for name, value in parameters(stock).items())
    assert moved > 1000 * tolerance
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert logged(waves, key) == pytest.approx(logged(stock, key), rel=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("wave_tokens", [16, 100, 200])
def test_one_step(tmp_path, tokenizer, wave_tokens, checkpointing, lora):
    model = float32_model(tokenizer)
    model = adapted(model) if lora else model
    both = train_both(
        tmp_path, tokenizer, model, wave_tokens, gradient_accumulation_steps=2, gradient_checkpointing=checkpointing
    )
    assert_equal(*both, model)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_either_kind_of_checkpointing(tmp_path, tokenizer, use_reentrant):
    model = float32_model(tokenizer)
    kwargs = {"use_reentrant": use_reentrant}
    both = train_both(
        tmp_path, tokenizer, model, 100, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs
    )
    assert_equal(*both, model)


def test_clipped_steps_of_adam(tmp_path, tokenizer):
    model = float32_model(tokenizer)
    settings = {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-4, "max_grad_norm": 0.5}
    both = train_both(tmp_path, tokenizer, model, 64, max_steps=8, per_device_train_batch_size=2, **settings)
    assert_equal(*both, model)


@pytest.mark.parametrize("settings", [{"loss_type": "nll"}, {"loss_type": "dft", "learning_rate": 10.0}])
def test_losses_and_evaluation(tmp_path, tokenizer, settings):
    model = float32_model(tokenizer)
    evaluation = CONVERSATIONS[:5]
    both = train_both(tmp_path, tokenizer, model, 100, evaluation, **settings)
    assert_equal(*both, model)
    stock, waves = (trainer.evaluate() for trainer in both)
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert waves[key] == pytest.approx(stock[key], rel=1e-5)


def test_auxiliary_loss_of_a_mixture_of_experts(tmp_path, tokenizer):
    model = float32_model(tokenizer, "qwen3-moe")
    both = train_both(tmp_path, tokenizer, model, 100, gradient_accumulation_steps=2, max_steps=2)
    assert_equal(*both, model)
    assert logged(both[1], "aux_loss") == pytest.approx(logged(both[0], "aux_loss"), rel=1e-5)


@pytest.mark.parametrize("family", ["gpt-oss", "gemma2", "gemma3", "mistral-sliding"])
def test_other_families(tmp_path, tokenizer, family):
    model = tiny_model(family, len(tokenizer), torch.float32, attn_implementation="eager", initializer_range=0.05)
    assert_equal(*train_both(tmp_path, tokenizer, model, 64), model)
