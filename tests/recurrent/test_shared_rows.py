"""Hybrids on rows that ranks share, at once and in waves, equal N-pass, however many heads their layers have."""

import pytest

from support.float64_comparison import CHECKPOINTING
from support.model_survey import branchy_chat
from support.sample_sets import branch_at_every_depth, reasoning_chat
from support.shared_rows import assert_shared_rows_equal_npass
from support.tiny_causal_lms import HYBRIDS, KINDS, tiny_model


pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning"),
]


def model_of(model_type, **overrides):
    model = tiny_model(model_type, **overrides)
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    return model


FAMILIES = [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in HYBRIDS]


@pytest.mark.parametrize("wave_tokens", [None, 20], ids=["row", "waves"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_two_ranks(model_type, wave_tokens):
    assert_shared_rows_equal_npass(model_of(model_type), [branchy_chat()], 2, wave_tokens)


@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_ranks_that_do_not_divide_the_heads(model_type, size):
    assert_shared_rows_equal_npass(model_of(model_type), [branch_at_every_depth()], size)


@pytest.mark.slow
@pytest.mark.parametrize("wave_tokens", [None, 25], ids=["row", "waves"])
@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("model_type", HYBRIDS)
def test_gradient_checkpointing(model_type, checkpointing, wave_tokens):
    model = model_of(model_type)
    if not model.supports_gradient_checkpointing:
        pytest.skip("has no gradient checkpointing")
    chats, prepare = [reasoning_chat(2), reasoning_chat(1, seed=1)], CHECKPOINTING[checkpointing]
    assert_shared_rows_equal_npass(model, chats, 2, wave_tokens, prepare)
