"""The trainer: its definition at the first step, options, streams, metrics, and what is refused by name."""

import re
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig

from support.pairs import (
    SINGLE_TURNS,
    TRAJECTORIES,
    batch_of,
    dpo_trainer,
    pair,
    pair_with_shared_turns,
)
from support.tiny_models import model_of_type
from support.trainers import float32_model, largest_difference, logged, overridden
from trl_singlepass import SinglePassDPOTrainer, render_samples
from trl_singlepass.preference.collator import TurnWeights


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")


def log_probs(model, samples, factors=None):
    """Σ over turns of the log-probability of each completion in its own context, one ordinary forward each."""
    total = 0.0
    for sample, factor in zip(samples, factors or [1.0] * len(samples), strict=True):
        ids, start = torch.tensor(sample.token_ids), sample.prompt_length
        log_p = model(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
        total = total + factor * log_p[torch.arange(len(ids) - start), ids[start:]].sum()
    return total


def turns_of(example, side, tokenizer):
    turns = render_samples(example["prompt"] + example[side], tokenizer)
    return [turn for turn in turns if turn.message_index >= len(example["prompt"])]


def gradients(loss, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def assert_close(ours, theirs, tolerance=1e-5):
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) <= tolerance * largest


def test_the_first_step_follows_the_definition(tmp_path, tokenizer):
    """With the policy as reference, the gradient is β/2 · (∇ log π(rejected) - ∇ log π(chosen)), a mean over pairs."""
    model = float32_model(tokenizer)
    trainer = dpo_trainer(tmp_path, tokenizer, TRAJECTORIES, model, float32_model(tokenizer), beta=0.3)
    loss = trainer._compute_loss(trainer.model, batch_of(trainer), return_outputs=False)
    assert float(loss.detach()) == pytest.approx(0.6931472, abs=1e-5)
    expected = sum(
        log_probs(model, turns_of(example, "rejected", tokenizer))
        - log_probs(model, turns_of(example, "chosen", tokenizer))
        for example in TRAJECTORIES
    )
    expected = gradients(0.3 / 2 * expected / len(TRAJECTORIES), model)
    assert_close(gradients(loss, trainer.model), expected)


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"turn_discount": 0.5}, [1.0, 6 / 7, 4 / 7]),
        ({"train_turns": "last"}, [0.0, 0.0, 1.0]),
        ({"train_turns": "from_difference"}, [0.0, 1.0, 1.0]),
    ],
    ids=["discount", "last", "from_difference"],
)
def test_options_weigh_turns(tmp_path, tokenizer, settings, factors):
    example, model = pair_with_shared_turns(1, 3), float32_model(tokenizer)
    trainer = dpo_trainer(tmp_path, tokenizer, [example], model, float32_model(tokenizer), **settings)
    loss = trainer._compute_loss(trainer.model, batch_of(trainer), return_outputs=False)
    difference = log_probs(model, turns_of(example, "rejected", tokenizer), factors) - log_probs(
        model, turns_of(example, "chosen", tokenizer), factors
    )
    assert_close(gradients(loss, trainer.model), gradients(0.1 / 2 * difference, model))


def test_discount_and_mean_weigh_turns():
    assert TurnWeights().of_tokens([2, 3]).tolist() == [1] * 5
    assert TurnWeights(discount=0.5).of_tokens([1, 2, 1]) == pytest.approx([1, 6 / 7, 6 / 7, 4 / 7])
    assert TurnWeights(is_mean=True).of_tokens([2, 4]) == pytest.approx([1 / 2] * 2 + [1 / 4] * 4)
    assert TurnWeights(discount=1e-9).of_tokens([1, 1]) == pytest.approx([1, 1])
    for discount in (0, 1, 1.5):
        with pytest.raises(ValueError, match="turn_discount"):
            TurnWeights(discount=discount)


def test_the_mean_of_a_turn(tmp_path, tokenizer):
    example, model = pair(2), float32_model(tokenizer)
    trainer = dpo_trainer(tmp_path, tokenizer, [example], model, float32_model(tokenizer), turn_mean=True)
    loss = trainer._compute_loss(trainer.model, batch_of(trainer), return_outputs=False)
    sides = {}
    for side in ("chosen", "rejected"):
        turns = turns_of(example, side, tokenizer)
        sides[side] = log_probs(model, turns, [1 / (len(turn) - turn.prompt_length) for turn in turns])
    assert_close(gradients(loss, trainer.model), gradients(0.05 * (sides["rejected"] - sides["chosen"]), model))


@pytest.mark.parametrize("model_type", ["qwen3_5_text", pytest.param("lfm2", marks=pytest.mark.slow)])
def test_hybrids_train_alike_stored_and_recomputed(tmp_path, tokenizer, model_type):
    model = model_of_type(model_type, vocab_size=len(tokenizer)).float()
    losses = []
    for checkpointing in (False, True):
        trainer = dpo_trainer(
            tmp_path, tokenizer, TRAJECTORIES, model, learning_rate=1e-3, max_steps=2,
            activation_checkpointing=checkpointing,
        )  # fmt: skip
        trainer.train()
        losses.append(logged(trainer, "grad_norm"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_stream_trains_as_stored_pairs(tmp_path, tokenizer):
    both = []
    for stored in (True, False):
        rows = datasets.Dataset.from_list(TRAJECTORIES)
        trainer = dpo_trainer(
            tmp_path, tokenizer, rows if stored else rows.to_iterable_dataset(),
            train_sampling_strategy="sequential", max_steps=3, per_device_train_batch_size=1,
        )  # fmt: skip
        trainer.train()
        both.append(trainer)
    assert largest_difference(*both) == 0
    assert logged(both[0], "num_trained_tokens")[-1] == logged(both[1], "num_trained_tokens")[-1]


def test_compute_metrics_gets_one_row_per_trajectory(tmp_path, tokenizer):
    seen = {}

    def compute_metrics(prediction):
        seen["logits"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {}

    kwargs = {"compute_metrics": compute_metrics}
    trainer = dpo_trainer(tmp_path, tokenizer, TRAJECTORIES, kwargs=kwargs, per_device_eval_batch_size=3)
    with pytest.warns(FutureWarning, match="return_outputs"):
        trainer.evaluate(datasets.Dataset.from_list(TRAJECTORIES))
    labels, logits = (torch.tensor(seen[name]) for name in ("labels", "logits"))
    assert len(labels) == 2 * len(TRAJECTORIES)
    sample = turns_of(TRAJECTORIES[0], "chosen", tokenizer)[0]
    completion = torch.tensor(sample.token_ids[sample.prompt_length :])
    assert torch.equal(labels[0, 1 : 1 + len(completion)], completion)
    expected = trainer.model(input_ids=torch.tensor(sample.token_ids)[None]).logits[0, sample.prompt_length - 1 : -1]
    assert torch.allclose(logits[0, : len(completion)], expected, atol=1e-4)


def test_the_log_has_what_is_shared(tmp_path, tokenizer):
    trainer = dpo_trainer(tmp_path, tokenizer, TRAJECTORIES, per_device_train_batch_size=3)
    trainer.train()
    rows = trainer.train_dataset
    expected = sum(map(sum, rows["multiplicity"])) / sum(map(len, rows["input_ids"]))
    assert logged(trainer, "sharing_factor") == [pytest.approx(expected)]
    assert logged(trainer, "num_tokens") == [sum(map(sum, rows["multiplicity"]))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"turn_discount": 2.0}, "turn_discount=2.0"),
        ({"train_turns": "first"}, "train_turns='first'"),
        ({"bad_rows": "skip"}, "bad_rows='skip'"),
        ({"max_length": 1}, "max_length=1 leaves no room"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'`:FutureWarning")
def test_settings_that_are_refused(tmp_path, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        dpo_trainer(tmp_path, tokenizer, SINGLE_TURNS[:1], **settings)


def test_a_layer_that_computes_something_else_the_second_time_is_found(tmp_path, tokenizer):
    trainer = dpo_trainer(tmp_path, tokenizer, TRAJECTORIES, max_row_tokens=270, per_device_train_batch_size=3)
    trainer.model.model.layers[0].register_forward_hook(lambda layer, args, output: output + torch.rand(()))
    with pytest.raises(RuntimeError, match="other log-probabilities when it runs again"):
        trainer.train()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**SINGLE_TURNS[0], "images": ["a.png"]}], "Qwen3ForCausalLM .*get_image_features"),
        ([{"messages": SINGLE_TURNS[0]["chosen"]}], "holds no pairs: expected the columns"),
    ],
)
def test_datasets_that_are_refused(tmp_path, tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        dpo_trainer(tmp_path, tokenizer, rows)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"data_collator": lambda rows: rows}, "data_collator=function would drop the trees"),
        ({"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "PromptTuningConfig"),
        ({"peft_config": LoraConfig(target_modules=["lm_head"])}, "lm_head"),
    ],
    ids=["collator", "prompt tuning", "adapter of the head"],
)
def test_arguments_that_are_refused(tmp_path, tokenizer, kwargs, message):
    with pytest.raises(ValueError, match=message):
        dpo_trainer(tmp_path, tokenizer, SINGLE_TURNS[:1], kwargs=kwargs, ref_model=None)


def test_internals_lists_what_the_trainer_overrides():
    page = (Path(__file__).parents[2] / "docs" / "internals.md").read_text().partition("## Preference pairs")[2]
    bullets = "".join(re.findall(r"^- ([^:]+):", page, re.M))
    assert set(re.findall(r"`(\w+)`", bullets)) == overridden(SinglePassDPOTrainer)
