"""Hybrid models in waves: inputs and states of recurrent layers are handed from wave to wave, exactly."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.float64_comparison import checkpoint_layers
from support.model_survey import branchy_chat
from support.sample_sets import branch_at_every_depth, nested_forks, reasoning_chat, sample_sets
from support.slow import slow_but_for
from support.tiny_models import HYBRIDS, HYBRIDS_AND_SLOW, KINDS, model_of_type
from support.wave_training import assert_waves_equal_npass, batch_of, plan_of, train_in_waves
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.recurrent.introspection import path_dependent_layers


pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning"),
]


def model_of(model_type, **overrides):
    model = model_of_type(model_type, **overrides)
    if hasattr(model.config, "output_router_logits"):  # that loss is no sum over tokens: tested through the trainer
        model.config.output_router_logits = False
    return model


@pytest.mark.parametrize("model_type", HYBRIDS_AND_SLOW)
def test_chat_with_short_branches(model_type):
    assert_waves_equal_npass(model_of(model_type), [branchy_chat()], [4])


@pytest.mark.parametrize("model_type", KINDS)
def test_sizes_from_one_token_to_the_row(model_type):
    length = batch_of([branch_at_every_depth()])["input_ids"].shape[1]
    assert_waves_equal_npass(model_of(model_type), [branch_at_every_depth()], [1, 7, length])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", HYBRIDS)
def test_every_size(model_type):
    """Of one of each kind; every third of the others."""
    for samples in (branch_at_every_depth(), nested_forks(3, 2)):
        length = batch_of([samples])["input_ids"].shape[1]
        sizes = range(1, length + 1, 1 if model_type in KINDS else 3)
        assert_waves_equal_npass(model_of(model_type), [samples], sizes)


@pytest.mark.parametrize("model_type", KINDS)
def test_nested_forks(model_type):
    assert_waves_equal_npass(model_of(model_type), [nested_forks(2, 2)], [4], keep_history=True)
    assert_waves_equal_npass(model_of(model_type), [nested_forks(2, 2)], [4], keep_history=False)


@pytest.mark.parametrize("use_reentrant", slow_but_for([False], [False, True]))
@pytest.mark.parametrize("model_type", HYBRIDS_AND_SLOW)
def test_gradient_checkpointing(model_type, use_reentrant):
    model = model_of(model_type)
    if not model.supports_gradient_checkpointing:
        pytest.skip("has no gradient checkpointing")
    # A row of 79 tokens, whose last wave of 25 tokens would be a single one.
    chats, prepare = [reasoning_chat(2), reasoning_chat(1, seed=1)], checkpoint_layers(use_reentrant)
    assert_waves_equal_npass(model, chats, [25], prepare=prepare, allow_single_tokens=False)


@pytest.mark.parametrize("model_type", KINDS)
def test_several_conversations_in_one_row_with_padding(model_type):
    chats = [reasoning_chat(2), reasoning_chat(1, seed=1), branch_at_every_depth()]
    assert_waves_equal_npass(model_of(model_type), chats, [30], pad_to_multiple_of=64)


@pytest.mark.parametrize("model_type", KINDS)
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=sample_sets(), size=st.integers(1, 50), keep=st.booleans())
def test_random_trees(model_type, samples, size, keep):
    assert_waves_equal_npass(model_of(model_type), [samples], [size], keep_history=keep)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", HYBRIDS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=sample_sets(max_samples=10, max_length=40), size=st.integers(1, 150), keep=st.booleans())
def test_many_random_trees(model_type, samples, size, keep):
    assert_waves_equal_npass(model_of(model_type), [samples], [size], keep_history=keep)


@pytest.mark.parametrize("model_type", KINDS)
def test_frozen_embeddings(model_type):
    model = model_of(model_type)
    model.get_input_embeddings().requires_grad_(False)  # the inputs of the first layer then have no gradients
    assert_waves_equal_npass(model, [branch_at_every_depth()], [9])


@pytest.mark.parametrize("model_type", KINDS)
def test_offloaded_inputs_and_states_train_the_same(model_type):
    assert_waves_equal_npass(model_of(model_type), [branch_at_every_depth()], [11], offload=True)


@pytest.mark.parametrize(("model_type", "tokens_per_fork"), [("qwen3_5_text", 1), ("lfm2", 2)])
def test_only_the_inputs_that_are_replayed_are_stored(model_type, tokens_per_fork):
    model = model_of(model_type)
    enable_tree(model)
    batch = batch_of([reasoning_chat(4)])
    plan = plan_of(batch, 60)
    _, runner = train_in_waves(model, batch, plan)
    layers = set(path_dependent_layers(model))
    inputs = [
        value.shape[1]
        for layer, tensors in runner.caches[0].inputs_and_states.items()
        for key, value in tensors.values.items()
        if layer in layers and key == ("hidden_states",)
    ]
    assert inputs
    assert plan.cached_tokens > 30
    assert set(inputs) == {3 * tokens_per_fork}
