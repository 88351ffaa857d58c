"""Packing: rows that are full, hold each conversation once, share what they can, and train what N-pass trains."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.conversations import chat, tool_chat
from support.float64_comparison import assert_equal_to_npass, one_row_each
from support.prefix_tree_reference import PrefixOracle, contents
from support.preparation import conversations_to_rows
from support.sample_sets import SYSTEM, reasoning_chat, sample_sets, with_system
from support.tiny_models import tiny_model
from support.trainers import as_dataset
from trl_singlepass.data.packing import assign_to_rows, pack_dataset, pack_rows
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.trees.sample import Sample
from trl_singlepass.trees.sharing import MIN_SHARED_TOKENS


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(sample_sets(), min_size=1, max_size=12), st.integers(0, 200))
def test_no_row_is_overfull_and_no_token_lost(sets, spare):
    sets = [with_system(samples) if index % 2 else samples for index, samples in enumerate(sets)]
    rows = one_row_each(sets)
    capacity = max(map(len, rows)) + spare
    packed = pack_rows(rows, capacity)
    assert max(map(len, packed)) <= capacity
    oracle = PrefixOracle([sample for samples in sets for sample in samples])
    targets, multiplicity = {}, {}
    for row in packed:
        for total, part in zip((targets, multiplicity), contents(row), strict=True):
            for key, value in part.items():
                total[key] = total.get(key, 0) + value
    assert targets == pytest.approx(oracle.weighted_targets)
    assert multiplicity == dict(oracle.multiplicity)
    assert sum(map(len, packed)) <= sum(map(len, rows))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60)), min_size=1, max_size=60), st.integers(60, 160))
def test_every_conversation_is_placed_once_and_fits(conversations, capacity):
    beginnings = [np.full(min(size, MIN_SHARED_TOKENS + 4), kind) for kind, size in conversations]
    sizes = np.array([size for _, size in conversations])
    rows = assign_to_rows(sizes, lambda i: beginnings[i], capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    for row in rows:
        distinct = {}
        for index in row:
            kind, size = conversations[index]
            distinct.setdefault(kind, []).append(size)
        assert sum(max(0, size - MIN_SHARED_TOKENS - 4) for sizes in distinct.values() for size in sizes) <= capacity


def test_conversations_that_begin_alike_stand_together():
    beginnings = [np.full(50, index % 2) for index in range(40)]
    rows = assign_to_rows([60] * 40, lambda i: beginnings[i], 50 + 20 * 10)
    assert len(rows) == 2
    assert [{index % 2 for index in row} for row in rows] in ([{0}, {1}], [{1}, {0}])


def test_a_group_that_fits_nowhere_whole_is_not_scattered():
    """In the room that large conversations leave, each member would repeat the beginning, for nothing."""
    large, members = 10, 10
    beginnings = [np.empty(0)] * large + [np.full(50, 1)] * members
    rows = assign_to_rows([140] * large + [60] * members, lambda i: beginnings[i], 200)
    assert len(rows) == large + 1
    assert sorted(rows[-1]) == list(range(large, large + members))


def test_room_is_kept_for_the_token_that_two_targets_fork():
    """After the same beginning, one trains 8 and the other 9: the 5 before them is stored twice."""
    rows = one_row_each(with_system([Sample.from_prompt_and_completion([5], [target])]) for target in (8, 9))
    joined = len(SYSTEM) + 2 * 2
    assert list(map(len, pack_rows(rows, joined))) == [joined]
    assert list(map(len, pack_rows(rows, joined - 1))) == [len(SYSTEM) + 2] * 2


def test_a_conversation_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"Conversation 1 has 9 tokens, a row has max_row_tokens=8.*Split it first"):
        assign_to_rows([3, 9], lambda i: np.empty(0), 8)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe", "gemma3"])
def test_sharing_across_conversations_is_exact(family):
    """Among them a prefix of another one, and one that trains another answer to the same beginning."""
    sets = [with_system(reasoning_chat(turns, seed=seed)) for turns, seed in ((3, 0), (2, 1), (3, 2))]
    sets += [sets[0][:2], with_system([Sample.from_prompt_and_completion([5], [9, 9, 2])]), reasoning_chat(2, seed=3)]

    def packed(sample_sets):
        rows = pack_rows(one_row_each(sample_sets), 4096)
        assert len(rows) == 1
        assert len(rows[0]) < sum(map(len, one_row_each(sample_sets))) - 4 * len(SYSTEM)
        return rows

    assert_equal_to_npass(tiny_model(family), sets, rows_of=packed)


@pytest.mark.usefixtures("float64")
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(sample_sets(max_samples=3, max_length=10), min_size=2, max_size=3))
def test_any_packed_trees_are_exact(sets):
    model = tiny_model("qwen3")
    assert_equal_to_npass(
        model, [with_system(s) for s in sets], rows_of=lambda sets: pack_rows(one_row_each(sets), 512)
    )


def chats_with_system():
    """Conversations of which all but the last have the same long system prompt."""
    system = {"role": "system", "content": "Answer with one number and say how you found it. " * 6}
    chats = [[system, *chat(1 + seed % 3, seed=seed)[1:]] for seed in range(5)]
    return [*chats, tool_chat()]


def test_several_processes_pack_the_same_rows(tokenizer):
    dataset = as_dataset(chats_with_system())
    one, several = (
        pack_dataset(
            conversations_to_rows(dataset, tokenizer, RowSettings(max_row_tokens=450), num_proc=n)[0], 450, num_proc=n
        )
        for n in (None, 2)
    )
    assert one[:] == several[:]
