"""
Every step is the mean over all its tokens, on one process and on ranks, whether or not the Trainer counts them for the
class of the model.
"""

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
from support.worker_settings import on_engine


LEARNING_RATE = 0.02
# The Trainer counts no tokens for these.
UNCOUNTED = [f"{name}ForConditionalGeneration" for name in ("Qwen3VL", "Qwen3_5", "Qwen3_5Moe", "Gemma4")]
CLASSES = [*UNCOUNTED, "Gemma3ForConditionalGeneration", "Qwen3ForCausalLM"]
QWEN = UNCOUNTED[0]
pytestmark = needs_weighted_loss  # older releases of TRL are refused


@pytest.fixture(scope="module")
def vocab_size():
    return len(make_tokenizer("qwen3"))


@pytest.fixture
def train(tmp_path, workers):
    """Return a function that trains a class on rows, `per_step` in a step, on one process or on both ranks."""

    def train(engine, class_name, rows, per_step=4, evaluate=None, own=None, **config):
        steps = {"max_steps": -1, "num_train_epochs": 1, "max_grad_norm": 0.0, "learning_rate": LEARNING_RATE}
        steps["gradient_accumulation_steps"] = per_step if engine is None else per_step // 2
        # Nothing but text: DDP has to be told that encoders of other media are not used.
        unused = {"ddp_find_unused_parameters": True, "gradient_checkpointing": False, "router_aux_loss_coef": 0.0}
        config = {"max_length": None, "per_device_train_batch_size": 1, **steps, **unused, **config}
        settings = {"class_name": class_name, "rows": rows, "evaluate": evaluate, "config": config, **(own or {})}
        settings, environment = (settings, {}) if engine is None else on_engine(engine, settings)
        return workers.run(tmp_path, settings, world_size=2 if engine else 1, environment=environment)

    return train


def assert_token_mean(run, class_name, *steps):
    """Assert that a run took steps on the mean losses of these samples, and logged them."""
    torch.manual_seed(0)
    model = model_for(class_name, make_tokenizer("qwen3"))
    assert_same_parameters(run.parameters, after_steps(model, *steps, learning_rate=LEARNING_RATE), model)
    before = [after_steps(model, *steps[:number], learning_rate=LEARNING_RATE) for number in range(len(steps))]
    losses = [mean_loss(at, samples) for at, samples in zip(before, steps, strict=True)]
    assert run.loss == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("engine", "class_name"),
    [
        *slow_but_for([(None, QWEN), (None, "Qwen3ForCausalLM")], itertools.product((None,), CLASSES)),
        *slow_but_for([("ddp", UNCOUNTED[-1]), ("ddp", "Qwen3ForCausalLM")], itertools.product(("ddp",), CLASSES)),
        ("zero3", QWEN),
    ],
)
def test_accumulated_batches_of_unequal_length(train, vocab_size, engine, class_name):
    rows = conversations(vocab_size, (3, 1, 2, 1))
    batches = {} if engine else {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run = train(engine, class_name, rows, **batches)
    assert_token_mean(run, class_name, samples_of(rows))
    assert run.num_trained_tokens == [sum(sum(weights) for _, weights in samples_of(rows))]


@pytest.mark.parametrize(
    ("engine", "class_name"),
    slow_but_for(
        [(None, QWEN), ("zero2", QWEN), ("fsdp2", QWEN)],
        itertools.product((None, "ddp", "zero1", "zero2", "fsdp2"), UNCOUNTED[:2]),
    ),
)
def test_last_step_of_an_epoch(train, vocab_size, engine, class_name):
    """Three rows: in the second step, the second rank has one that was trained in the first."""
    rows = conversations(vocab_size, (3, 1, 2))
    run = train(engine, class_name, rows, per_step=2)
    assert_token_mean(run, class_name, samples_of(rows[:2]), samples_of(rows[2:]))


def test_a_rank_that_only_repeats_a_row_does_not_count_where_ranks_are_averaged(train, vocab_size):
    rows = conversations(vocab_size, (3, 1, 2))[2:]
    run = train("ddp", QWEN, rows, per_step=2, average_tokens_across_devices=False)
    assert_token_mean(run, QWEN, samples_of(rows))


@pytest.mark.parametrize(
    ("engine", "wave_tokens", "class_name"),
    [
        *slow_but_for([(None, 24, QWEN), ("ddp", 24, QWEN)], itertools.product((None, "ddp"), (24,), UNCOUNTED)),
        *slow_but_for([(None, None, QWEN)], itertools.product((None,), (None,), UNCOUNTED)),
        ("ulysses", None, QWEN),
    ],
)
def test_weights_of_messages_and_tokens(train, vocab_size, engine, wave_tokens, class_name):
    rows = with_weights(conversations(vocab_size, (3, 1, 2, 1)))
    run = train(engine, class_name, rows, wave_tokens=wave_tokens)
    assert (max(run.num_waves, default=1) > 1) == (wave_tokens is not None)
    assert_token_mean(run, class_name, samples_of(rows))


@pytest.mark.parametrize("class_name", slow_but_for([QWEN], UNCOUNTED))
@pytest.mark.parametrize("wave_tokens", [None, 24])
def test_mean_over_turns(train, vocab_size, class_name, wave_tokens):
    rows = conversations(vocab_size)
    run = train(None, class_name, rows, loss_reduction="turn", wave_tokens=wave_tokens)
    assert_token_mean(run, class_name, samples_of(rows, is_mean_of_turns=True))


@pytest.mark.parametrize(("engine", "reduction"), [(None, "token"), ("ddp", "turn")])
def test_split_rows(train, vocab_size, engine, reduction):
    rows = conversations(vocab_size, (6,))
    longest = max(len(tokens) for tokens, _ in samples_of(rows))
    run = train(engine, QWEN, rows, per_step=198, loss_reduction=reduction, max_row_tokens=longest + 1)
    assert run.row_tokens <= longest + 1
    assert_token_mean(run, QWEN, samples_of(rows, is_mean_of_turns=reduction == "turn"))


@pytest.mark.parametrize("class_name", slow_but_for([QWEN], UNCOUNTED))
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("weighs", [False, True])
def test_evaluation(train, vocab_size, class_name, batch_size, weighs):
    rows = conversations(vocab_size)
    rows = with_weights(rows) if weighs else rows
    run = train(None, class_name, rows, evaluate=rows, per_device_eval_batch_size=batch_size, learning_rate=0.0)
    torch.manual_seed(0)
    expected = mean_loss(model_for(class_name, make_tokenizer("qwen3")), samples_of(rows))
    assert run.evaluation["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_ranks_that_share_the_layers(train, vocab_size):
    pytest.importorskip("transformers.distributed.configuration_utils", reason="needs DistributedConfig")
    class_name, rows = "Qwen2_5_VLForConditionalGeneration", conversations(vocab_size, (3, 1, 2, 1))
    engine, own = {"use_cpu": False, "ddp_backend": "gloo"}, {"fsdp_on_cpu": True, "divided": {"tp_size": 2}}
    run = train("ddp", class_name, rows, per_step=8, own=own, **engine)
    assert run.tp_size == 2
    assert_token_mean(run, class_name, samples_of(rows))
