"""On ranks, every step is the mean over all tokens, for models that the Trainer counts no tokens for as well."""

import itertools

import pytest
import torch

from support.chat_tokenizers import make_tokenizer
from support.slow import slow_but_for
from support.tiny_multimodal import model_for
from support.token_mean_reference import (
    after_steps,
    assert_same_parameters,
    conversations,
    mean_loss,
    samples_of,
    with_weights,
)
from support.trainers import needs_weighted_loss
from support.worker_settings import on_engine, zero


LEARNING_RATE = 0.02
UNCOUNTED = ["Qwen3VLForConditionalGeneration", "Qwen3_5ForConditionalGeneration", "Gemma4ForConditionalGeneration"]
CLASSES = [*UNCOUNTED, "Gemma3ForConditionalGeneration", "Qwen3ForCausalLM"]
DEFAULT = ["Gemma4ForConditionalGeneration", "Qwen3ForCausalLM"]
ENGINES = ["ddp", "zero1", "zero2", "fsdp2"]
pytestmark = needs_weighted_loss


@pytest.fixture(scope="module")
def vocab_size():
    return len(make_tokenizer("qwen3"))


def settings_of(class_name, rows, **config):
    """Return settings of the worker: steps of plain SGD, one row per rank and batch."""
    steps = {"max_steps": -1, "num_train_epochs": 1, "max_grad_norm": 0.0, "learning_rate": LEARNING_RATE}
    # Nothing but text: DDP has to be told that encoders of other media are not used.
    unused = {"ddp_find_unused_parameters": True, "gradient_checkpointing": False}
    return {"class_name": class_name, "rows": rows, "config": {"max_length": None, **steps, **unused, **config}}


def assert_token_mean(run, class_name, *steps):
    """Assert that a run took steps on the mean losses of these samples, and logged them."""
    torch.manual_seed(0)
    model = model_for(class_name, make_tokenizer("qwen3"))
    assert_same_parameters(run.parameters, after_steps(model, *steps, learning_rate=LEARNING_RATE), model)
    before = [after_steps(model, *steps[:number], learning_rate=LEARNING_RATE) for number in range(len(steps))]
    losses = [mean_loss(at, samples) for at, samples in zip(before, steps, strict=True)]
    assert run.loss == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("class_name", slow_but_for(DEFAULT, CLASSES))
def test_two_ranks(tmp_path, workers, vocab_size, class_name):
    rows = conversations(vocab_size, (3, 1, 2, 1))
    settings, environment = on_engine("ddp", settings_of(class_name, rows, gradient_accumulation_steps=2))
    run = workers.run(tmp_path, settings, world_size=2, environment=environment)
    assert_token_mean(run, class_name, samples_of(rows))
    assert run.num_trained_tokens == [sum(sum(weights) for _, weights in samples_of(rows))]


@pytest.mark.parametrize(
    ("class_name", "engine"),
    slow_but_for([(UNCOUNTED[0], "zero2"), (UNCOUNTED[0], "fsdp2")], itertools.product(UNCOUNTED[:2], ENGINES)),
)
def test_a_rank_that_only_repeats_a_row_adds_nothing(tmp_path, workers, vocab_size, class_name, engine):
    """Three rows: in the second step, the second rank has one that was trained in the first."""
    rows = conversations(vocab_size, (3, 1, 2))
    settings, environment = on_engine(engine, settings_of(class_name, rows))
    run = workers.run(tmp_path, settings, world_size=2, environment=environment)
    assert_token_mean(run, class_name, samples_of(rows[:2]), samples_of(rows[2:]))


@pytest.mark.parametrize("class_name", UNCOUNTED[:1])
def test_a_rank_that_only_repeats_a_row_does_not_count_where_ranks_are_averaged(
    tmp_path, workers, vocab_size, class_name
):
    rows = conversations(vocab_size, (3, 1, 2))
    config = settings_of(class_name, rows[2:], average_tokens_across_devices=False)
    run = workers.run(tmp_path, on_engine("ddp", config)[0], world_size=2)
    assert_token_mean(run, class_name, samples_of(rows[2:]))


@pytest.mark.parametrize("class_name", slow_but_for(UNCOUNTED[:1], UNCOUNTED))
def test_weights_and_waves(tmp_path, workers, vocab_size, class_name):
    rows = with_weights(conversations(vocab_size, (3, 1, 2, 1)))
    settings = settings_of(class_name, rows, gradient_accumulation_steps=2, wave_tokens=24)
    run = workers.run(tmp_path, on_engine("ddp", settings)[0], world_size=2)
    assert_token_mean(run, class_name, samples_of(rows))


@pytest.mark.parametrize("class_name", UNCOUNTED[:1])
def test_mean_over_turns_of_split_rows(tmp_path, workers, vocab_size, class_name):
    rows = conversations(vocab_size, (6,))
    longest = max(len(tokens) for tokens, _ in samples_of(rows))
    settings = settings_of(
        class_name, rows, loss_reduction="turn", max_row_tokens=longest + 1, gradient_accumulation_steps=99
    )
    run = workers.run(tmp_path, on_engine("ddp", settings)[0], world_size=2)
    assert_token_mean(run, class_name, samples_of(rows, is_mean_of_turns=True))


def test_parameters_that_zero_3_shards(tmp_path, workers, vocab_size):
    rows = conversations(vocab_size, (3, 1, 2, 1))
    settings, environment = on_engine("zero3", settings_of(UNCOUNTED[0], rows, gradient_accumulation_steps=2))
    run = workers.run(tmp_path, settings, world_size=2, environment=environment)
    assert_token_mean(run, UNCOUNTED[0], samples_of(rows))


def test_ranks_that_share_each_row(tmp_path, workers, vocab_size):
    rows = with_weights(conversations(vocab_size, (3, 1, 2, 1)))
    deepspeed = {"deepspeed": zero(3), "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    settings = {**settings_of(UNCOUNTED[0], rows, **deepspeed), "sp_size": 2}
    run = workers.run(tmp_path, settings, world_size=2)
    assert_token_mean(run, UNCOUNTED[0], samples_of(rows))


def test_ranks_that_share_the_layers(tmp_path, workers, vocab_size):
    pytest.importorskip("transformers.distributed.configuration_utils", reason="needs DistributedConfig")
    class_name, rows = "Qwen2_5_VLForConditionalGeneration", conversations(vocab_size, (3, 1, 2, 1))
    engine = {"use_cpu": False, "ddp_backend": "gloo", "per_device_train_batch_size": 1}
    settings = settings_of(class_name, rows, gradient_accumulation_steps=4, **engine)
    run = workers.run(tmp_path, {**settings, "fsdp_on_cpu": True, "divided": {"tp_size": 2}}, world_size=2)
    assert run.tp_size == 2
    assert_token_mean(run, class_name, samples_of(rows))
