"""Hybrids on rows that ranks share, at once and in waves, equal N-pass, however many heads their layers have."""

import pytest

from support.float64_comparison import CHECKPOINTING, in_float64
from support.model_survey import branchy_chat
from support.sample_sets import branch_at_every_depth, reasoning_chat
from support.shared_rows import assert_shared_rows_equal_npass, share_rows, train_part
from support.slow import slow_but_for
from support.thread_ranks import on_ranks
from support.tiny_models import HYBRIDS, model_of_type
from support.wave_training import batch_of


pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning"),
]


def model_of(model_type, **overrides):
    model = model_of_type(model_type, **overrides)
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    return model


def families(quick):
    """Return all model types, those that are not quick for the slow tests."""
    return slow_but_for([quick], HYBRIDS)


@pytest.mark.parametrize("wave_tokens", [None, 20], ids=["row", "waves"])
@pytest.mark.parametrize("model_type", families("qwen3_5_text"))
def test_two_ranks(model_type, wave_tokens):
    assert_shared_rows_equal_npass(model_of(model_type), [branchy_chat()], 2, wave_tokens)


@pytest.mark.parametrize("size", [3, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model_type", families("bamba"))
def test_ranks_that_do_not_divide_the_heads(model_type, size):
    assert_shared_rows_equal_npass(model_of(model_type), [branch_at_every_depth()], size)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "wave_tokens"), [("non-reentrant", None), ("reentrant", 25)])
@pytest.mark.parametrize("model_type", HYBRIDS)
def test_gradient_checkpointing(model_type, checkpointing, wave_tokens):
    model = model_of(model_type)
    if not model.supports_gradient_checkpointing:
        pytest.skip("has no gradient checkpointing")
    chats, prepare = [reasoning_chat(2), reasoning_chat(1, seed=1)], CHECKPOINTING[checkpointing]
    assert_shared_rows_equal_npass(model, chats, 2, wave_tokens, prepare)


def test_what_a_rank_sends():
    """Forward and backward, as `docs/distributed.md` counts it, and the decay and strength of each head's update."""
    models = [model_of("qwen3_5_text", layer_types=["linear_attention"] * 2) for _ in range(2)]

    def run(group):
        share_rows(models[group.rank])
        in_float64(train_part)(models[group.rank], batch_of([branchy_chat()]), group)
        return group.process_group.sent_bytes[group.rank]

    config, length = models[0].config, batch_of([branchy_chat()])["tree"].plan.length
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    per_token = 8 * (6 * keys + 4 * values + 2 * config.linear_num_value_heads)
    # Two layers, two directions; each rank sends half of what it has of its half of the row.
    assert on_ranks(2, run) == [2 * 2 * per_token * ((length + 1) // 2) // 2] * 2
