"""Rows that ranks share, at once and in waves, equal N-pass, however many heads their layers have."""

import pytest

from support.float64_comparison import CHECKPOINTING, in_float64
from support.row_training import assert_shared_rows_equal_npass, batch_of, share_rows, train_part
from support.sample_sets import branch_at_every_depth, branchy_chat, nested_forks, reasoning_chat
from support.slow import slow_but_for
from support.thread_ranks import on_ranks
from support.tiny_models import FAMILIES, HYBRIDS, without_router_loss


pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning"),
]

QUICK = ["llama4", "gpt-oss", "qwen3_5_text"]  # temperatures by depth; sinks per head; states


@pytest.mark.parametrize("wave_tokens", [None, 20], ids=["row", "waves"])
@pytest.mark.parametrize("name", slow_but_for(QUICK, [*FAMILIES, *HYBRIDS]))
def test_two_ranks(name, wave_tokens):
    chats = [reasoning_chat(3), nested_forks(2, 2)] if name in FAMILIES else [branchy_chat()]
    assert_shared_rows_equal_npass(without_router_loss(name), chats, 2, wave_tokens)


@pytest.mark.parametrize("size", [3, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model_type", slow_but_for(["bamba"], HYBRIDS))
def test_ranks_that_do_not_divide_the_heads(model_type, size):
    assert_shared_rows_equal_npass(without_router_loss(model_type), [branch_at_every_depth()], size)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (6, 2), (12, 6), (6, 3), (8, 8)], ids=str)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_heads_and_keys_that_the_ranks_divide_or_not(size, heads):
    model = without_router_loss("qwen3", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    assert_shared_rows_equal_npass(model, [reasoning_chat(2)], size, wave_tokens=25)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("wave_tokens", [None, 25], ids=["row", "waves"])
@pytest.mark.parametrize("name", ["qwen3", *HYBRIDS])
def test_gradient_checkpointing(name, checkpointing, wave_tokens):
    model = without_router_loss(name)
    if not model.supports_gradient_checkpointing:
        pytest.skip("has no gradient checkpointing")
    chats, prepare = [reasoning_chat(2), reasoning_chat(1, seed=1)], CHECKPOINTING[checkpointing]
    assert_shared_rows_equal_npass(model, chats, 2, wave_tokens, prepare)


def test_what_a_rank_sends():
    """Forward and backward, as `docs/distributed.md` counts it, and the decay and strength of each head's update."""
    models = [without_router_loss("qwen3_5_text", layer_types=["linear_attention"] * 2) for _ in range(2)]

    def run(group):
        share_rows(models[group.rank])
        in_float64(train_part)(models[group.rank], [branchy_chat()], group)
        return group.process_group.sent_bytes[group.rank]

    config, length = models[0].config, batch_of([branchy_chat()])["tree"].plan.length
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    per_token = 8 * (6 * keys + 4 * values + 2 * config.linear_num_value_heads)
    # Two layers, two directions; each rank sends half of what it has of its half of the row.
    assert on_ranks(2, run) == [2 * 2 * per_token * ((length + 1) // 2) // 2] * 2
