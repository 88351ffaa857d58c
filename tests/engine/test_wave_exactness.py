"""Float64: loss and every gradient of a row in waves equal those of separate forwards, for all kinds of layers."""

from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.float64_comparison import CHECKPOINTING, checkpoint_layers
from support.hybrids import run_in_pieces
from support.model_survey import TEXT_MODELS, class_of, read_page
from support.row_training import assert_waves_equal_npass, batch_of, plan_of, train_in_waves
from support.sample_sets import branch_at_every_depth, branchy_chat, nested_forks, reasoning_chat, sample_sets
from support.slow import slow_but_for
from support.tiny_models import FAMILIES, HYBRIDS, KINDS, without_router_loss
from support.tiny_multimodal import tiny_conditional
from support.varlen_reference import ReferenceKernel, switch
from trl_singlepass.attention import flash, registry, varlen_plan
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.recurrent.measurement import path_dependent_layers


pytestmark = [
    pytest.mark.usefixtures("float64"),
    # New names are not in all releases of transformers that are supported.
    pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning"),
]

# From one token at a time to the whole row; the row of `reasoning_chat()` has 107 tokens, its history 38.
SIZES = [1, 30, 66, 1000]
# Plain, windows with and without sinks and experts, chunks.
ATTENTION = ["qwen3", "gemma3", "gpt-oss", "llama4"]
# One of each kind, and one whose layers take over what earlier ones selected; the others are tried by the slow tests.
MODELS = slow_but_for([*ATTENTION, *KINDS, "glm_moe_dsa"], [*FAMILIES, *HYBRIDS])
ONE_OF_EACH_KIND = [*ATTENTION, *KINDS]
IN_WAVES = {"samples": sample_sets(), "size": st.integers(1, 50), "keep": st.booleans()}
RANDOM = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_from_one_token_to_the_row(name):
    if name in FAMILIES:
        assert_waves_equal_npass(without_router_loss(name), [reasoning_chat()], SIZES)
    else:
        assert_waves_equal_npass(without_router_loss(name), [branchy_chat()], [4])
        if name in KINDS:
            length = batch_of([branch_at_every_depth()])["input_ids"].shape[1]
            assert_waves_equal_npass(without_router_loss(name), [branch_at_every_depth()], [1, 7, length])


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "bamba", "lfm2"])
def test_layers_that_run_piece_by_piece(model_type):
    for samples, sizes in ((branch_at_every_depth(), [1, 7]), (nested_forks(3, 2), [11])):
        assert_waves_equal_npass(without_router_loss(model_type), [samples], sizes, run_in_pieces)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", HYBRIDS)
def test_every_size(model_type):
    """Of one of each kind; every third of the others."""
    for samples in (branch_at_every_depth(), nested_forks(3, 2)):
        length = batch_of([samples])["input_ids"].shape[1]
        sizes = range(1, length + 1, 1 if model_type in KINDS else 3)
        assert_waves_equal_npass(without_router_loss(model_type), [samples], sizes)


@pytest.mark.parametrize(
    ("name", "use_reentrant"),
    slow_but_for(
        [*product(ATTENTION, (False, True)), *product((*KINDS, "glm_moe_dsa"), (False,))],
        product([*FAMILIES, *HYBRIDS], (False, True)),
    ),
)
def test_gradient_checkpointing(name, use_reentrant):
    model = without_router_loss(name)
    if not model.supports_gradient_checkpointing:
        pytest.skip("has no gradient checkpointing")
    # A row of 79 tokens, whose last wave of 25 tokens would be a single one.
    chats, prepare = [reasoning_chat(2), reasoning_chat(1, seed=1)], checkpoint_layers(use_reentrant)
    assert_waves_equal_npass(model, chats, [25], prepare=prepare, allow_single_tokens=False)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("model_type", KINDS)
def test_nested_forks(model_type, keep):
    assert_waves_equal_npass(without_router_loss(model_type), [nested_forks(2, 2)], [4], keep_history=keep)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
@settings(max_examples=6, **RANDOM)
@given(**IN_WAVES)
def test_random_trees(name, samples, size, keep):
    assert_waves_equal_npass(without_router_loss(name), [samples], [size], keep_history=keep)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, *HYBRIDS])
@settings(max_examples=80, **RANDOM)
@given(samples=sample_sets(max_samples=10, max_length=40), size=st.integers(1, 150), keep=st.booleans())
def test_many_random_trees(name, samples, size, keep):
    assert_waves_equal_npass(without_router_loss(name), [samples], [size], keep_history=keep)


@pytest.mark.parametrize("name", slow_but_for(ONE_OF_EACH_KIND, [*FAMILIES, *KINDS]))
def test_several_conversations_in_one_row(name):
    chats = [reasoning_chat(2), reasoning_chat(1, seed=1), branch_at_every_depth()]
    sizes = [9, 70] if name in FAMILIES else [30]
    assert_waves_equal_npass(without_router_loss(name), chats, sizes, pad_to_multiple_of=64)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_frozen_parameters(name):
    """Embeddings, so that the inputs of the first layer have no gradients, and keys of the second layer."""
    model = without_router_loss(name)
    model.get_input_embeddings().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if "layers.1." in parameter_name and "k_proj" in parameter_name:
            parameter.requires_grad_(False)
    assert_waves_equal_npass(model, [branch_at_every_depth()], [9, 30])


@pytest.mark.parametrize("family", ["gemma3", "llama4"])
def test_long_chat_over_many_windows(family):
    assert_waves_equal_npass(without_router_loss(family), [reasoning_chat(turns=12)], [13, 100])


@pytest.mark.parametrize("name", ["qwen3", "gemma3", *KINDS])
def test_what_is_offloaded_trains_the_same(name):
    chats = [reasoning_chat(turns=4), branchy_chat()] if name in FAMILIES else [branch_at_every_depth()]
    assert_waves_equal_npass(without_router_loss(name), chats, [7, 40], offload=True)


@pytest.mark.parametrize(
    ("model_type", "name", "tokens_per_fork"),
    [
        ("qwen3_5_text", "convolution 0", 3),
        ("qwen3_5_text", "hidden_states", 1),
        ("lfm2", "convolution 0", 2),
        ("lfm2", "hidden_states", 2),
    ],
)
def test_only_the_inputs_that_are_replayed_are_stored(model_type, name, tokens_per_fork):
    model = without_router_loss(model_type)
    enable_tree(model)
    if name == "hidden_states":
        run_in_pieces(model)
    batch = batch_of([reasoning_chat(4)])
    plan = plan_of(batch, 60)
    _, runner = train_in_waves(model, batch, plan)
    layers = set(path_dependent_layers(model))
    inputs = [
        value.shape[1]
        for layer, tensors in runner.caches[0].inputs_and_states.items()
        for key, value in tensors.values.items()
        if layer in layers and key == (name,)
    ]
    assert plan.cached_tokens > 30
    assert set(inputs) == {3 * tokens_per_fork}


# Varlen kernels ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _varlen(monkeypatch):
    """A varlen kernel in plain PyTorch in place of every flash kernel."""
    for module in (flash, registry):
        monkeypatch.setattr(module, "flash_kernel", lambda implementation: ReferenceKernel())


@pytest.mark.usefixtures("_varlen")
@pytest.mark.parametrize("keys_per_call", [4, 0])
@pytest.mark.parametrize("family", ATTENTION)
def test_varlen_kernels(family, keys_per_call, monkeypatch):
    """Whole paths are gathered, or the beginnings that branches share come in a call of their own."""
    monkeypatch.setattr(varlen_plan, "KEYS_PER_CALL", keys_per_call)
    assert_waves_equal_npass(without_router_loss(family), [reasoning_chat()], [25, 66], switch=switch)


@pytest.mark.slow
@pytest.mark.usefixtures("_varlen")
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_on_varlen_kernels(family, checkpointing):
    prepare = CHECKPOINTING[checkpointing]
    assert_waves_equal_npass(without_router_loss(family), [reasoning_chat()], SIZES, prepare=prepare, switch=switch)


@pytest.mark.usefixtures("_varlen")
@pytest.mark.parametrize("family", slow_but_for(["gemma3"], ["gemma3", "gpt-oss"]))
@settings(max_examples=10, **RANDOM)
@given(**IN_WAVES)
def test_random_trees_on_varlen_kernels(family, samples, size, keep):
    assert_waves_equal_npass(without_router_loss(family), [samples], [size], keep_history=keep, switch=switch)


# Every model that a single pass takes --------------------------------------------------------------------------------

EXACT = [key for key, outcome in read_page()[1].items() if outcome.status == "exact"]
SEVERAL_CALLS = ["diffllama", "dory"]  # with two values per key; with layers that run in a loop


@pytest.mark.slow
@pytest.mark.parametrize(("table", "name"), EXACT)
def test_every_model_on_the_page(table, name):
    if table == TEXT_MODELS:
        model = without_router_loss(name)
    else:
        model = tiny_conditional(class_of(table, name))
        config = model.config.get_text_config()
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False
    assert_waves_equal_npass(model, [branchy_chat()], [4, 40])


@pytest.mark.parametrize("name", SEVERAL_CALLS)
def test_each_call_of_a_layer_has_its_own_keys_and_values(name):
    assert_waves_equal_npass(without_router_loss(name), [branchy_chat()], [40])
    assert_waves_equal_npass(without_router_loss(name), [branchy_chat()], [4], offload=True)


def loop(model):
    model.backbone.layers = torch.nn.ModuleList([model.backbone.layers[0]] * 2)


@pytest.mark.parametrize(
    ("name", "prepare"),
    [("mamba2", loop), *((name, checkpoint_layers(kind)) for name in SEVERAL_CALLS for kind in (True, False))],
)
def test_layers_that_run_several_times_are_refused(name, prepare):
    with pytest.raises(NotImplementedError, match="several times in a forward"):
        assert_waves_equal_npass(without_router_loss(name), [branchy_chat()], [40], prepare=prepare)
