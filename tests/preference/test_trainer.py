"""The trainer: its definition at the first step, options, streams, metrics, and what is refused by name."""

import re
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig
from trl import DPOConfig

from support.pairs import SINGLE_TURNS, TRAJECTORIES, batch_of, pair_with_shared_turns
from support.trainers import dpo_trainer, float32_model, logged, overridden
from trl_singlepass import SinglePassDPOTrainer, render_samples


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


OPTIONS = {
    "discount": ({"turn_discount": 0.5}, lambda turns: [1.0, 6 / 7, 4 / 7]),
    "last": ({"train_turns": "last"}, lambda turns: [0.0, 0.0, 1.0]),
    "from_difference": ({"train_turns": "from_difference"}, lambda turns: [0.0, 1.0, 1.0]),
    "mean": ({"turn_mean": True}, lambda turns: [1 / (len(turn) - turn.prompt_length) for turn in turns]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_weigh_turns(tmp_path, tokenizer, name):
    settings, factors = OPTIONS[name]
    example, model = pair_with_shared_turns(1, 3), float32_model(tokenizer)
    trainer = dpo_trainer(tmp_path, tokenizer, [example], model, float32_model(tokenizer), **settings)
    loss = trainer._compute_loss(trainer.model, batch_of(trainer), return_outputs=False)
    sides = {}
    for side in ("chosen", "rejected"):
        turns = turns_of(example, side, tokenizer)
        sides[side] = log_probs(model, turns, factors(turns))
    assert_close(gradients(loss, trainer.model), gradients(0.05 * (sides["rejected"] - sides["chosen"]), model))


def test_hybrids_train_alike_stored_and_recomputed(tmp_path, tokenizer):
    settings = {"learning_rate": 1e-3, "max_steps": 2}
    model = float32_model(tokenizer, "qwen3_5_text")
    both = [
        dpo_trainer(tmp_path, tokenizer, TRAJECTORIES, model, activation_checkpointing=checkpointing, **settings)
        for checkpointing in (False, True)
    ]
    for trainer in both:
        trainer.train()
    assert logged(both[0], "grad_norm") == pytest.approx(logged(both[1], "grad_norm"), rel=1e-3)


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


def test_a_layer_that_computes_something_else_the_second_time_is_found(tmp_path, tokenizer):
    settings = {"max_row_tokens": 270, "per_device_train_batch_size": 3, "self_check": False}
    trainer = dpo_trainer(tmp_path, tokenizer, TRAJECTORIES, **settings)
    trainer.model.model.layers[0].register_forward_hook(lambda layer, args, output: output + torch.rand(()))
    with pytest.raises(RuntimeError, match="other log-probabilities when it runs again"):
        trainer.train()


def test_what_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="holds no pairs: expected the columns"):
        dpo_trainer(tmp_path, tokenizer, [{"messages": SINGLE_TURNS[0]["chosen"]}])
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        SinglePassDPOTrainer(float32_model(tokenizer), args=DPOConfig(str(tmp_path), bf16=False))
    kwargs = {"peft_config": LoraConfig(target_modules=["lm_head"])}
    with pytest.raises(ValueError, match="lm_head"):
        dpo_trainer(tmp_path, tokenizer, SINGLE_TURNS[:1], kwargs=kwargs)
    for discount in (0, 1, 1.5):
        with pytest.raises(ValueError, match="turn_discount"):
            dpo_trainer(tmp_path, tokenizer, SINGLE_TURNS[:1], turn_discount=discount)


def test_internals_lists_what_the_trainer_overrides():
    page = (Path(__file__).parents[2] / "docs" / "internals.md").read_text().partition("## Preference pairs")[2]
    bullets = "".join(re.findall(r"^- ([^:]+):", page, re.M))
    assert set(re.findall(r"`(\w+)`", bullets)) == overridden(SinglePassDPOTrainer)
