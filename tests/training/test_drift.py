"""What trains is what was measured: layers that a small row does not show, and models that change later."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, set_seed

from support.conversations import chat, expand
from support.drifting_layers import DRIFTING, ActsLater
from support.groups import as_prompts, reward
from support.pairs import pair
from support.planted_layers import TokenShift, plant
from support.trainers import (
    CONVERSATIONS,
    SETTINGS,
    assert_trained_alike,
    dpo_trainer,
    float32_model,
    in_order,
    largest_difference,
    on_samples,
    parameters,
    single_pass_trainer,
    stock_dpo_trainer,
    stock_trainer,
)
from trl_singlepass import SinglePassGRPOConfig, SinglePassGRPOTrainer, SinglePassSFTTrainer
from trl_singlepass.engine.check.checked_model import TreeCheckError


CHATS = [chat(3), chat(2, seed=1)]
PAIRS = [pair(2), pair(1, seed=1)]


@pytest.fixture(params=["conversations", "pairs"])
def make(request, tmp_path, tokenizer):
    """Make a trainer of either kind."""

    def make_trainer(model=None, **settings):
        if request.param == "pairs":
            return dpo_trainer(tmp_path, tokenizer, PAIRS, model, **settings)
        return single_pass_trainer(tmp_path, tokenizer, CHATS, model, **settings)

    return make_trainer


def assert_stopped(trainer, error=ValueError, match=None):
    """Train, and assert that an error comes before the first step changes anything."""
    before = parameters(trainer)
    with pytest.raises(error, match=match):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in parameters(trainer).items())


class Calls(TrainerCallback):
    """Calls a function at the beginning of a step."""

    def __init__(self, function, step=1):
        self.function, self.step = function, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function(kwargs["model"])


# Layers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRIFTING)
def test_what_a_small_row_does_not_show_stops_a_run(make, tokenizer, name):
    model, _ = plant(float32_model(tokenizer), DRIFTING[name])
    assert_stopped(make(model), TreeCheckError)


def test_a_layer_that_acts_after_some_steps_stops_a_run(make, tokenizer):
    """It counts, and what counts is measured again."""
    model, _ = plant(float32_model(tokenizer), ActsLater)
    with pytest.raises(TreeCheckError):
        make(model, max_steps=20).train()


# Between the check and the step --------------------------------------------------------------------------------------


def test_a_stock_trainer_on_the_same_model_changes_nothing(tmp_path, tokenizer):
    """It puts its head around the model; ours trains on trees as before, and stock ones as without ours."""
    model = float32_model(tokenizer)
    alone = single_pass_trainer(tmp_path, tokenizer, CHATS, copy.deepcopy(model))
    alone.train()
    shared = copy.deepcopy(model)
    ours = single_pass_trainer(tmp_path, tokenizer, CHATS, shared)
    stock_trainer(tmp_path, tokenizer, CHATS, shared)
    ours.train()
    assert largest_difference(alone, ours) < 1e-7

    alone, shared = stock_trainer(tmp_path, tokenizer, CHATS, copy.deepcopy(model)), copy.deepcopy(model)
    ours = single_pass_trainer(tmp_path, tokenizer, CHATS, shared)
    stock = stock_trainer(tmp_path, tokenizer, CHATS, shared)
    for trainer in (alone, stock):
        trainer.train()
    assert largest_difference(alone, stock) < 1e-7


def test_stock_dpo_on_an_enabled_model_trains_as_stock(tmp_path, tokenizer):
    model = float32_model(tokenizer)
    reference = copy.deepcopy(model)
    alone = stock_dpo_trainer(tmp_path, tokenizer, PAIRS, model, reference)
    single_pass_trainer(tmp_path, tokenizer, CHATS, model)
    stock = stock_dpo_trainer(tmp_path, tokenizer, PAIRS, model, reference)  # on a copy
    for trainer in (alone, stock):
        trainer.train()
    assert largest_difference(alone, stock) < 1e-7


def test_attention_that_is_set_between_two_runs_stops_the_second(make):
    trainer = make()
    trainer.train()
    trainer.model.set_attn_implementation("sdpa")
    assert_stopped(trainer)


def test_attention_that_a_callback_sets_stops_the_run(make):
    trainer = make(max_steps=3, kwargs={"callbacks": [Calls(lambda model: model.set_attn_implementation("sdpa"))]})
    with pytest.raises(ValueError, match="attn_implementation"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_loss_that_drops_the_tree_stops_the_run(tmp_path, tokenizer):
    class OwnLoss(SinglePassSFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            names = ("input_ids", "attention_mask", "position_ids", "labels")
            return model(**{name: inputs[name] for name in names}).loss

    trainer = single_pass_trainer(tmp_path, tokenizer, CHATS)
    trainer.__class__ = OwnLoss
    assert_stopped(trainer, match="tree")


@pytest.mark.parametrize("is_wrong", [False, True])
def test_what_a_callback_adds_is_measured(make, tokenizer, is_wrong):
    """An adapter of another kind, or one that mixes tokens, and layers that it thaws."""
    adapted = get_peft_model(float32_model(tokenizer), LoraConfig(r=4, target_modules=["q_proj"]))

    def add(model):
        model = model if hasattr(model, "add_adapter") else model.module
        model.add_adapter("second", LoraConfig(r=4, target_modules=["down_proj"]))
        model.set_adapter("second")
        if is_wrong:
            lora = model.base_model.model.model.layers[1].mlp.down_proj.lora_B["second"]
            forward = lora.forward
            lora.forward = lambda x: forward(torch.roll(x, 1, dims=1))

    trainer = make(adapted, max_steps=2, kwargs={"callbacks": [Calls(add)]})
    if is_wrong:
        with pytest.raises(TreeCheckError, match="lora_B"):
            trainer.train()
        assert trainer.state.global_step == 1
    else:
        trainer.train()


def test_a_layer_that_a_callback_switches_is_measured(make, tokenizer):
    model, _ = plant(float32_model(tokenizer), TokenShift, strength=0.0)

    def switch(model):
        next(module for module in model.modules() if isinstance(module, TokenShift)).strength = 1.0

    trainer = make(model, max_steps=3, kwargs={"callbacks": [Calls(switch, step=2)]})
    with pytest.raises(TreeCheckError, match="TokenShift"):
        trainer.train()
    assert trainer.state.global_step == 2


# RoPE by length ------------------------------------------------------------------------------------------------------


def longrope(limit, head_dim=8):
    factors = torch.linspace(1, 4, head_dim // 2).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * len(factors),
        "long_factor": factors,
        "factor": 4.0,
        "original_max_position_embeddings": limit,
    }


@pytest.mark.parametrize("own", [{}, {"wave_tokens": 48}], ids=["row", "waves"])
@pytest.mark.parametrize("limit", [16, 60, 100, 1000])
def test_longrope_has_the_factors_of_each_sample(tmp_path, tokenizer, limit, own):
    """Samples on both sides of the limit share no tokens, and each has the factors that it would have alone."""
    model = float32_model(tokenizer, "llama", rope_parameters=longrope(limit))
    samples = [[sample] for messages in CONVERSATIONS[:3] for sample in expand(messages)]
    steps = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(samples)}
    stock = on_samples(tmp_path, tokenizer, model, samples, **steps)  # no two in a batch, whose longest one decides
    ours = in_order(tmp_path, tokenizer, model, CONVERSATIONS[:3], per_device_train_batch_size=3, **own)
    for trainer in (stock, ours):
        trainer.train()
    assert_trained_alike(stock, ours, model)


def test_longrope_of_pairs_on_both_sides_is_refused(tmp_path, tokenizer):
    model = float32_model(tokenizer, "llama", rope_parameters=longrope(60))
    assert_stopped(dpo_trainer(tmp_path, tokenizer, PAIRS, model), match="longrope")


def test_dynamic_rope_is_refused(make, tokenizer):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ValueError, match="dynamic"):
        make(float32_model(tokenizer, "llama", rope_parameters=rope, max_position_embeddings=64))


# Groups ------------------------------------------------------------------------------------------------------------


def groups_trainer(tmp_path, tokenizer, model):
    args = SinglePassGRPOConfig(
        str(tmp_path), **SETTINGS, per_device_train_batch_size=4, num_generations=4, max_completion_length=8, beta=0.0
    )
    return SinglePassGRPOTrainer(model, reward, args, train_dataset=as_prompts(), processing_class=tokenizer)


@pytest.mark.parametrize("change", ["layer", "attention", "stock"])
def test_groups_are_exact_or_stopped(tmp_path, tokenizer, change):
    """A layer that pools long rows, attention that is set, and a stock trainer that puts its head around the model."""
    model = float32_model(tokenizer)
    if change == "layer":
        plant(model, DRIFTING["PoolsLongRows"])
    alone = groups_trainer(tmp_path, tokenizer, copy.deepcopy(model))
    trainer = groups_trainer(tmp_path, tokenizer, model)
    if change == "stock":
        stock_trainer(tmp_path, tokenizer, CHATS, model)
        for each in (alone, trainer):
            set_seed(0)
            each.train()
        assert largest_difference(alone, trainer) < 1e-7
        return
    if change == "attention":
        trainer.model.set_attn_implementation("sdpa")
    assert_stopped(trainer)
