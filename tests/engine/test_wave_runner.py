"""Float64: loss and every gradient of a row in waves equal those of separate forwards."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.float64_comparison import CHECKPOINTING
from support.sample_sets import reasoning_chat, sample_sets
from support.slow import slow_but_for
from support.tiny_models import FAMILIES, MIXTURES, tiny_model
from support.varlen_reference import ReferenceKernel, switch
from support.wave_training import assert_waves_equal_npass
from trl_singlepass.attention import flash, registry, varlen_plan


pytestmark = [
    pytest.mark.usefixtures("float64"),
    # Its new name is not in all releases of transformers that are supported.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]

# From one token at a time to the whole row; the row of `reasoning_chat()` has 107 tokens, its history 38.
SIZES = [1, 30, 66, 1000]
# Plain, windows with and without sinks and experts, chunks.
KINDS = ["qwen3", "gemma3", "gpt-oss", "llama4"]
FAMILIES_AND_SLOW = slow_but_for(KINDS, FAMILIES)


def model_of(family, **overrides):
    # The load-balancing loss is no sum over tokens: what it takes is tested through the trainer.
    return tiny_model(family, **({"output_router_logits": False} if family in MIXTURES else {}), **overrides)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES_AND_SLOW)
def test_reasoning_chat(family, checkpointing):
    sizes = SIZES if checkpointing == "stored" else [30]
    assert_waves_equal_npass(model_of(family), [reasoning_chat()], sizes, prepare=CHECKPOINTING[checkpointing])


@pytest.mark.parametrize("family", FAMILIES_AND_SLOW)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=sample_sets(), size=st.integers(1, 50), keep=st.booleans())
def test_random_trees(family, samples, size, keep):
    assert_waves_equal_npass(model_of(family), [samples], [size], keep_history=keep)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=sample_sets(max_samples=10, max_length=40), size=st.integers(1, 150), keep=st.booleans())
def test_many_random_trees(family, samples, size, keep):
    assert_waves_equal_npass(model_of(family), [samples], [size], keep_history=keep)


@pytest.mark.parametrize("family", FAMILIES_AND_SLOW)
def test_several_conversations_in_one_row(family):
    chats = [reasoning_chat(turns, seed=seed) for seed, turns in enumerate((3, 1, 2))]
    assert_waves_equal_npass(model_of(family), chats, [70])
    assert_waves_equal_npass(model_of(family), chats, [9], pad_to_multiple_of=64)


@pytest.mark.parametrize("family", ["qwen3", "gpt-oss"])
def test_frozen_layers(family):
    model = model_of(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1." in name and "k_proj" not in name)
    assert_waves_equal_npass(model, [reasoning_chat()], [30, 66])


@pytest.mark.parametrize("family", ["gemma3", "llama4"])
def test_long_chat_over_many_windows(family):
    assert_waves_equal_npass(model_of(family), [reasoning_chat(turns=12)], [13, 100])


@pytest.fixture
def _varlen(monkeypatch):
    """A varlen kernel in plain PyTorch in place of every flash kernel."""
    for module in (flash, registry):
        monkeypatch.setattr(module, "flash_kernel", lambda implementation: ReferenceKernel())


@pytest.mark.usefixtures("_varlen")
@pytest.mark.parametrize("keys_per_call", [4, 0])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt-oss", "llama4"])
def test_reasoning_chat_on_varlen_kernels(family, keys_per_call, monkeypatch):
    """Whole paths are gathered, or the beginnings that branches share come in a call of their own."""
    monkeypatch.setattr(varlen_plan, "KEYS_PER_CALL", keys_per_call)
    assert_waves_equal_npass(model_of(family), [reasoning_chat()], [25, 66], switch=switch)


@pytest.mark.slow
@pytest.mark.usefixtures("_varlen")
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_waves_on_varlen_kernels(family, checkpointing):
    prepare = CHECKPOINTING[checkpointing]
    assert_waves_equal_npass(model_of(family), [reasoning_chat()], SIZES, prepare=prepare, switch=switch)


@pytest.mark.usefixtures("_varlen")
@pytest.mark.parametrize("family", slow_but_for(["gemma3"], ["gemma3", "gpt-oss"]))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=sample_sets(), size=st.integers(1, 50), keep=st.booleans())
def test_random_trees_on_varlen_kernels(family, samples, size, keep):
    assert_waves_equal_npass(model_of(family), [samples], [size], keep_history=keep, switch=switch)
