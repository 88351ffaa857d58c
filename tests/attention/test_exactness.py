"""Float64: loss and every gradient of a single pass equal those of separate forwards."""

import pytest
from hypothesis import HealthCheck, example, given, settings

from support.float64_comparison import CHECKPOINTING, assert_equal_to_npass
from support.sample_sets import nested_forks, reasoning_chat, sample_sets
from support.tiny_models import CUT_OFF, FAMILIES, tiny_model


pytestmark = [
    pytest.mark.usefixtures("float64"),
    # Its new name is not in all releases of transformers that are supported.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_chat(family, checkpointing):
    overrides = CUT_OFF.get(family, {}) if checkpointing == "reentrant" else {}
    model = tiny_model(family, **overrides)
    assert_equal_to_npass(model, [reasoning_chat()], prepare=CHECKPOINTING[checkpointing])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=sample_sets())
@example(samples=nested_forks())
def test_random_trees(family, samples):
    assert_equal_to_npass(tiny_model(family), [samples])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=sample_sets(max_samples=10, max_length=40))
def test_many_random_trees(family, samples):
    assert_equal_to_npass(tiny_model(family), [samples])


@pytest.mark.parametrize("pad_to_multiple_of", [None, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_several_conversations_in_one_row(family, pad_to_multiple_of):
    chats = [reasoning_chat(turns, seed=seed) for seed, turns in enumerate((3, 1, 2))]
    assert_equal_to_npass(tiny_model(family), chats, pad_to_multiple_of=pad_to_multiple_of)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_both_stock_implementations(attn_implementation):
    assert_equal_to_npass(tiny_model("qwen3", attn_implementation=attn_implementation), [reasoning_chat()])


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt-oss"])
def test_frozen_layers(family):
    model = tiny_model(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1." in name and "k_proj" not in name)
    assert_equal_to_npass(model, [reasoning_chat()])


@pytest.mark.parametrize("family", ["gemma3", "llama4"])
def test_long_chat_over_many_windows(family):
    assert_equal_to_npass(tiny_model(family), [reasoning_chat(turns=12)])
