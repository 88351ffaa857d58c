"""Pairs with images: gradients as separate forwards through the processor give them, each distinct image once."""

import datasets
import pytest
import torch

from support.preparation import prepare_pairs
from support.screens import screen_pair, text_pair
from support.tiny_vision import tiny_processor, tiny_vision_model
from support.trainers import dpo_trainer, largest_difference, logged, train_both_on_pairs
from trl_singlepass import audit, verify
from trl_singlepass.data.bad_rows import BadRows
from trl_singlepass.data.pairs import PAIR_COLUMNS
from trl_singlepass.data.settings import PairSettings


def log_probs(model, processor, pair, images, side):
    """Σ over turns of log π, one ordinary forward each on what the processor makes of text and images."""
    messages, total = pair["prompt"] + pair[side], 0.0
    for k in range(1, len(messages), 2):
        prompt = processor.apply_chat_template(messages[:k], tokenize=False, add_generation_prompt=True)
        whole = processor.apply_chat_template(messages[: k + 1], tokenize=False)
        assert whole.startswith(prompt)
        count = sum(part["type"] == "image" for message in messages[:k] for part in message["content"])
        inputs = processor(text=[whole], images=[images[:count]], return_tensors="pt")
        start = processor(text=[prompt], images=[images[:count]], return_tensors="pt")["input_ids"].shape[1]
        log_p = model(**inputs, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
        completion = inputs["input_ids"][0, start:]
        total = total + log_p[torch.arange(len(completion)), completion].sum()
    return total


FAMILIES = ["qwen3_vl", pytest.param("gemma3", marks=pytest.mark.slow)]


@pytest.mark.parametrize(
    "settings", [{}, {"max_row_tokens": 110, "wave_tokens": 40}], ids=["one row", "rows in waves"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_follows_the_definition(tmp_path, family, settings):
    """With the policy as reference, the gradient is β/2 · (∇ log π(rejected) - ∇ log π(chosen)), a mean over pairs."""
    model, processor = tiny_vision_model(family)
    examples = [screen_pair(tmp_path, seed) for seed in range(2)]
    sides = {
        side: sum(log_probs(model, processor, pair, images[side], side) for pair, images in examples)
        for side in ("chosen", "rejected")
    }
    named = dict(model.named_parameters())
    expected = torch.autograd.grad(
        0.05 * (sides["rejected"] - sides["chosen"]) / 2, named.values(), allow_unused=True, materialize_grads=True
    )
    pairs = [pair for pair, _ in examples]
    settings = {"per_device_train_batch_size": 2, **settings}
    trainer = dpo_trainer(tmp_path / "out", processor, pairs, model, model, max_length=None, **settings)
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    assert (len(batch["tree"].rows) > 1) == ("max_row_tokens" in settings)
    loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.6931472, abs=1e-4)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for (name, parameter), gradient in zip(trainer.model.named_parameters(), expected, strict=True):
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert float((own - gradient).abs().max()) <= 1e-5 * largest, name
    assert any(
        float(gradient.abs().max()) > 0 for name, gradient in zip(named, expected, strict=True) if "vis" in name
    )


def test_an_image_of_both_trajectories_is_encoded_once(tmp_path):
    model, processor = tiny_vision_model("qwen3_vl")
    trainer = dpo_trainer(tmp_path / "out", processor, [screen_pair(tmp_path, 0)[0]], model, max_length=None)
    (row,) = trainer.data_collator(list(trainer.train_dataset))["tree"].rows
    assert len(row["image_grid_thw"]) == 4


@pytest.mark.parametrize("left_out", ["a bad row", "a side that is too long"])
def test_a_pair_that_is_left_out_leaves_the_others_as_they_are(tmp_path, left_out):
    processor = tiny_processor("qwen3_vl")
    first, third = (screen_pair(tmp_path, seed)[0] for seed in (0, 2))
    second, settings = text_pair(1), PairSettings()
    if left_out == "a bad row":
        second["chosen"] = []
    else:
        second["prompt"][0]["content"][0]["text"] = "What is it? " * 100
        settings = PairSettings(max_length=250)
    rows = prepare_pairs(
        datasets.Dataset.from_list([first, second, third]), processor, settings, bad_rows=BadRows.DROP
    )
    expected = prepare_pairs(datasets.Dataset.from_list([first, third]), processor, settings)
    for name in (*PAIR_COLUMNS, "image_features"):
        assert rows[name][:] == expected[name][:], name


@pytest.mark.slow
def test_a_stream_and_stored_pairs_train_alike(tmp_path):
    both = []
    for stored in (True, False):
        model, processor = tiny_vision_model("qwen3_vl")
        rows = datasets.Dataset.from_list([screen_pair(tmp_path, seed)[0] for seed in range(3)])
        settings = {"train_sampling_strategy": "sequential", "max_steps": 3, "per_device_train_batch_size": 1}
        rows = rows if stored else rows.to_iterable_dataset()
        trainer = dpo_trainer(tmp_path / "out", processor, rows, model, max_length=None, **settings)
        trainer.train()
        both.append(trainer)
    assert largest_difference(*both) == 0
    assert len(set(logged(both[0], "loss"))) > 1


def test_verify_and_audit_read_them(tmp_path):
    model, processor = tiny_vision_model("qwen3_vl")
    pairs = [screen_pair(tmp_path, 0)[0]]
    assert verify(model, processor, pairs).ok
    report = audit(pairs, processor)
    assert (report.num_trainable, report.all_turns.trainable, report.errors) == (1, 4, ())


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"max_row_tokens": 110}], ids=["one row", "rows"])
def test_pairs_of_a_single_turn_train_as_stock(tmp_path, settings):
    pairs = [screen_pair(tmp_path, seed)[0] for seed in range(4)]
    pairs = [{**pair, "chosen": pair["chosen"][:1], "rejected": pair["rejected"][:1]} for pair in pairs]
    model, processor = tiny_vision_model("qwen3_vl")
    steps = {"max_length": None, "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.02}
    assert largest_difference(*train_both_on_pairs(tmp_path, processor, model, pairs, settings, **steps)) <= 1e-6
