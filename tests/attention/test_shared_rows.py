"""Attention of every kind on rows that ranks share, at once and in waves, equals N-pass."""

import pytest

from support.float64_comparison import CHECKPOINTING
from support.sample_sets import nested_forks, reasoning_chat
from support.shared_rows import assert_shared_rows_equal_npass
from support.slow import slow_but_for
from support.tiny_models import FAMILIES, tiny_model


pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning"),
]

QUICK = ["llama4", "gpt-oss"]  # temperatures by depth; sinks per head


def model_of(family, **overrides):
    model = tiny_model(family, **overrides)
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    return model


@pytest.mark.parametrize("wave_tokens", [None, 20], ids=["row", "waves"])
@pytest.mark.parametrize("family", slow_but_for(QUICK, FAMILIES))
def test_two_ranks(family, wave_tokens):
    assert_shared_rows_equal_npass(model_of(family), [reasoning_chat(3), nested_forks(2, 2)], 2, wave_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (6, 2), (12, 6), (6, 3), (8, 8)], ids=str)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_heads_and_keys_that_the_ranks_divide_or_not(size, heads):
    model = model_of("qwen3", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    assert_shared_rows_equal_npass(model, [reasoning_chat(2)], size, wave_tokens=25)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("wave_tokens", [None, 20], ids=["row", "waves"])
def test_gradient_checkpointing(checkpointing, wave_tokens):
    prepare = CHECKPOINTING[checkpointing]
    assert_shared_rows_equal_npass(model_of("qwen3"), [reasoning_chat(3)], 2, wave_tokens, prepare)
