"""Every step is the mean over all its tokens, whether or not the Trainer counts them for the class of the model."""

import pytest
import trl
from packaging.version import Version

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
from support.trainers import in_order, logged, needs_weighted_loss, parameters


# The Trainer counts no tokens for these.
UNCOUNTED = slow_but_for(
    ["Qwen3VLForConditionalGeneration"],
    [f"{name}ForConditionalGeneration" for name in ("Qwen3VL", "Qwen3_5", "Qwen3_5Moe", "Gemma4")],
)
CLASSES = [*UNCOUNTED, *slow_but_for(["Qwen3ForCausalLM"], ["Gemma3ForConditionalGeneration", "Qwen3ForCausalLM"])]
ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "learning_rate": 0.02}
pytestmark = [
    needs_weighted_loss,  # older releases of TRL are refused
    pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning"),  # of stock training as well
]


def train(tmp_path, tokenizer, model, rows, evaluation=None, **settings):
    """Train a copy of a model; return the trainer."""
    trainer = in_order(tmp_path, tokenizer, model, rows, evaluation, router_aux_loss_coef=0.0, **settings)
    trainer.train()
    return trainer


def assert_token_mean(trainer, model, *steps):
    """Assert that a trainer took steps on the mean losses of these samples, and logged them."""
    rate = trainer.args.learning_rate
    assert_same_parameters(parameters(trainer), after_steps(model, *steps, learning_rate=rate), model)
    before = [after_steps(model, *steps[:number], learning_rate=rate) for number in range(len(steps))]
    losses = [mean_loss(at, samples) for at, samples in zip(before, steps, strict=True)]
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize(("batch_size", "accumulation"), slow_but_for([(2, 2)], [(2, 2), (1, 4)]))
def test_accumulated_batches_of_unequal_length(tmp_path, tokenizer, class_name, batch_size, accumulation):
    model, rows = model_for(class_name, tokenizer), conversations(len(tokenizer))
    settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer = train(tmp_path, tokenizer, model, rows, **settings)
    assert_token_mean(trainer, model, samples_of(rows))
    num_tokens = sum(len(turn["completion_ids"]) for row in rows for turn in row["turns"])
    assert logged(trainer, "num_trained_tokens") == [num_tokens]
    assert logged(trainer, "sharing_factor")[0] > 1


@pytest.mark.parametrize("class_name", UNCOUNTED)
def test_last_step_of_an_epoch_has_fewer_batches(tmp_path, tokenizer, class_name):
    model, rows = model_for(class_name, tokenizer), conversations(len(tokenizer), (3, 1, 2))
    settings = {**ACCUMULATED, "gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 0.01}
    trainer = train(tmp_path, tokenizer, model, rows, **settings)
    assert_token_mean(trainer, model, samples_of(rows[:2]), samples_of(rows[2:]))


@pytest.mark.parametrize("class_name", UNCOUNTED)
def test_split_rows(tmp_path, tokenizer, class_name):
    model, rows = model_for(class_name, tokenizer), conversations(len(tokenizer), (6,))
    longest = max(len(tokens) for tokens, _ in samples_of(rows))
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 99, "max_row_tokens": longest + 1}
    trainer = train(tmp_path, tokenizer, model, rows, **settings)
    assert len(trainer.train_dataset) > 1
    assert_token_mean(trainer, model, samples_of(rows))


@pytest.mark.parametrize("class_name", UNCOUNTED)
@pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="waves need trl>=1.16")
def test_waves(tmp_path, tokenizer, class_name):
    model, rows = model_for(class_name, tokenizer), conversations(len(tokenizer))
    trainer = train(tmp_path, tokenizer, model, rows, wave_tokens=24, **ACCUMULATED)
    assert max(logged(trainer, "num_waves")) > 1
    assert_token_mean(trainer, model, samples_of(rows))


@pytest.mark.parametrize("class_name", UNCOUNTED)
@pytest.mark.parametrize("wave_tokens", [None, 24])
def test_mean_over_turns(tmp_path, tokenizer, class_name, wave_tokens):
    model, rows = model_for(class_name, tokenizer), conversations(len(tokenizer))
    trainer = train(tmp_path, tokenizer, model, rows, loss_reduction="turn", wave_tokens=wave_tokens, **ACCUMULATED)
    assert_token_mean(trainer, model, samples_of(rows, is_mean_of_turns=True))


@pytest.mark.parametrize("class_name", UNCOUNTED)
def test_weights_of_messages_and_tokens(tmp_path, tokenizer, class_name):
    model, rows = model_for(class_name, tokenizer), with_weights(conversations(len(tokenizer)))
    trainer = train(tmp_path, tokenizer, model, rows, **ACCUMULATED)
    assert_token_mean(trainer, model, samples_of(rows))


@pytest.mark.parametrize("class_name", UNCOUNTED)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation(tmp_path, tokenizer, class_name, batch_size):
    model, rows = model_for(class_name, tokenizer), conversations(len(tokenizer))
    settings = {"per_device_eval_batch_size": batch_size, "learning_rate": 0.0}
    for evaluation in (rows, with_weights(rows)):
        trainer = train(tmp_path, tokenizer, model, rows, evaluation, **settings)
        expected = mean_loss(model, samples_of(evaluation))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
