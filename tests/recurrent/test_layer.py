"""Recurrent layers on trees: exact for every hybrid family, whatever the tree, with and without checkpointing."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from support.float64_comparison import assert_equal_to_npass, checkpoint_layers, forward
from support.hybrids import run_in_pieces, run_over_whole_paths
from support.row_training import batch_of
from support.sample_sets import branch_at_every_depth, branchy_chat, reasoning_chat, sample_sets
from support.tiny_models import HYBRIDS_AND_SLOW, KINDS, model_of_type
from support.trainers import needs_cached_states
from support.tree_checks import checked
from trl_singlepass.attention.context import running_on
from trl_singlepass.engine.enable import disable_tree, enable_tree
from trl_singlepass.engine.model_call import as_tree
from trl_singlepass.recurrent.layer import runs_on_trees
from trl_singlepass.recurrent.measurement import measured_layers, path_dependent_layers
from trl_singlepass.reference.verification import ForcedFloat64
from trl_singlepass.trees.sample import Sample


pytestmark = [
    needs_cached_states,
    # The reference kernels of transformers say that they are slow.
    pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning"),
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model_type", HYBRIDS_AND_SLOW)
def test_several_conversations_in_one_row_with_padding(model_type):
    chats = [reasoning_chat(2), reasoning_chat(1, seed=1), branch_at_every_depth()]
    assert_equal_to_npass(model_of_type(model_type), chats, pad_to_multiple_of=64)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("model_type", HYBRIDS_AND_SLOW)
def test_gradient_checkpointing(model_type, use_reentrant):
    model = model_of_type(model_type)
    if not model.supports_gradient_checkpointing:
        pytest.skip("has no gradient checkpointing")
    # Reentrant checkpointing keeps no gradient for what leaves a layer on the side, in N-pass as well.
    model.config.output_router_logits = not use_reentrant and getattr(model.config, "output_router_logits", False)
    assert_equal_to_npass(model, [reasoning_chat(2), branchy_chat()], prepare=checkpoint_layers(use_reentrant))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model_type", KINDS)
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=sample_sets())
def test_random_trees(model_type, samples):
    assert_equal_to_npass(model_of_type(model_type), [samples])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "kimi_linear", "bamba", "lfm2", "zamba2"])
def test_the_row_at_once_and_states_at_forks_equal_whole_paths(model_type):
    model = model_of_type(model_type)
    enable_tree(model)
    at_once, _ = forward(model, [branchy_chat()])
    assert all(replay.kernels is not None for replay in measured_layers(model).values())
    run_in_pieces(model)
    from_states, _ = forward(model, [branchy_chat()])
    run_over_whole_paths(model)
    slow, _ = forward(model, [branchy_chat()])
    for fast in (at_once, from_states):
        assert (fast.logits - slow.logits).abs().max() <= 1e-12 * slow.logits.abs().max()


def test_a_chain_of_one_sample_per_tree_is_not_taken_for_one_text():
    # Their multiplicity is 1 everywhere, which transformers takes for "nothing to mask".
    chats = [[Sample.from_prompt_and_completion(list(range(5, 12)), [40 + seed, 41])] for seed in range(3)]
    with ForcedFloat64():
        assert_equal_to_npass(model_of_type("qwen3_5_text"), chats)


@pytest.mark.parametrize("model_type", KINDS)
def test_ordinary_batches_run_as_before(model_type):
    model = model_of_type(model_type).float().eval()
    batch = {"input_ids": torch.arange(5, 25).reshape(2, 10)}
    before = model(**batch).logits
    implementation = enable_tree(model)
    layers = list(path_dependent_layers(model))
    assert layers
    assert all(map(runs_on_trees, layers))
    assert torch.equal(model(**batch).logits, before)
    disable_tree(model, implementation)
    assert not any("forward" in vars(layer) for layer in layers)
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("model_type", KINDS)
def test_a_copied_model_runs_its_own_layers(model_type):
    model = model_of_type(model_type)
    enable_tree(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    outputs, _ = forward(twin, [reasoning_chat(2)])
    assert outputs.logits.abs().max() > 0


def test_selecting_attention_refuses_kernels_of_other_attention():
    model = model_of_type("deepseek_v32")
    for config in (model.config, *(layer.config for layer in path_dependent_layers(model))):
        config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='sdpa' or 'eager', not 'flex_attention'"):
        enable_tree(model)


def test_models_that_look_ahead_are_found():
    report = checked(model_of_type("bert", is_decoder=False).float())
    assert not report.ok
    assert "bert.encoder.layer.0.attention.self" in report.where


def without_cache(forward):
    return lambda *args, cache, **kwargs: forward(*args, **kwargs)


def test_a_layer_that_does_not_take_its_state_from_the_cache_is_refused(monkeypatch):
    model = model_of_type("qwen3_5_text")
    enable_tree(model)
    run_in_pieces(model)
    for layer in path_dependent_layers(model):
        monkeypatch.setattr(layer, "_stock_forward", without_cache(layer._stock_forward))
    with pytest.raises(RuntimeError, match="would be trained without their history"):
        forward(model, [branch_at_every_depth()])


def test_trees_are_freed_with_their_row():
    model = model_of_type("qwen3_5_text")
    enable_tree(model)
    batch = batch_of([reasoning_chat(2)])
    tree = as_tree(batch["tree"])
    with torch.no_grad(), running_on(tree):
        model(**{name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}, use_cache=False)
    tree = weakref.ref(tree)
    gc.collect()
    assert tree() is None
