"""Varlen calls: together they see exactly the mask, and gather no more keys than they can use."""

import pytest
import torch
from hypothesis import given, settings

from support.dense_reference import dense_mask
from support.sample_sets import reasoning_chat
from support.tree_masks import mask_of, row_of_ten, tree_masks, tree_of
from trl_singlepass.attention.varlen_plan import varlen_calls


def sequences_of(mask):
    """Positions of the queries and the keys of every sequence that a kernel is given."""
    length = mask.tree.plan.length
    for call in varlen_calls(mask):
        queries, keys = torch.arange(call.start, call.end), torch.arange(length)
        keys = keys if call.key_index is None else call.key_index.long()
        for i in range(len(call.cu_seqlens_q) - 1):
            yield (
                call,
                queries[call.cu_seqlens_q[i] : call.cu_seqlens_q[i + 1]],
                keys[call.cu_seqlens_k[i] : call.cu_seqlens_k[i + 1]],
            )


@settings(max_examples=150)
@given(mask=tree_masks())
def test_calls_see_exactly_the_mask(mask):
    seen = torch.zeros_like(dense_mask(mask))
    for call, queries, keys in sequences_of(mask):
        behind = torch.arange(len(queries))[:, None] + len(keys) - len(queries) - torch.arange(len(keys))
        visible = (behind >= 0) & (behind < (call.window or len(seen)))
        seen[queries[:, None], keys] |= visible
        assert bool(visible.any(1).all())
    assert torch.equal(seen, dense_mask(mask))


@settings(max_examples=100)
@given(mask=tree_masks())
def test_gathered_paths_are_contiguous_in_depth(mask):
    """Which is why a kernel's window, that counts keys back from the query, is a window by depth."""
    depth = mask.tree.depth[0]
    for _, queries, keys in sequences_of(mask):
        assert torch.equal(depth[keys], torch.arange(len(keys)) + depth[keys[0]])
        assert torch.equal(keys[len(keys) - len(queries) :], queries)


@settings(max_examples=50)
@given(mask=tree_masks(("window", "chunk")))
def test_local_layers_gather_no_more_than_they_can_see(mask):
    size = mask.local_size
    for _, queries, keys in sequences_of(mask):
        assert len(keys) <= len(queries) + size - 1


def test_number_of_calls_does_not_grow_with_branches():
    calls = {turns: len(varlen_calls(mask_of(tree_of([reasoning_chat(turns)]), "causal", 0))) for turns in (1, 3, 9)}
    assert calls == {1: 1, 3: 1, 9: 1}


def test_a_long_shared_history_is_gathered_in_parts():
    mask = mask_of(tree_of([reasoning_chat(80)]), "causal", 0)
    calls, length = varlen_calls(mask), mask.tree.plan.length
    keys = [len(call.key_index) for call in calls]
    assert 1 < len(calls) <= sum(keys) / (4 * length) * 2 + 1
    assert max(keys) <= 4 * length


def test_plain_text_is_not_gathered():
    mask = mask_of(tree_of([reasoning_chat(1), reasoning_chat(1, seed=1)]), "causal", 0)
    (call,) = varlen_calls(mask)
    assert call.key_index is None


def test_a_rule_that_flash_kernels_do_not_know_is_refused():
    with pytest.raises(ValueError, match="neither causal nor a sliding window nor a chunk"):
        varlen_calls(mask_of(tree_of([reasoning_chat()]), "other", 4))


@pytest.mark.parametrize(
    ("kind", "size", "cu_seqlens_q", "cu_seqlens_k", "key_index", "window"),
    [
        ("causal", 0, [0, 7, 10], [0, 7, 13], [*range(7), 0, 1, 2, 7, 8, 9], None),
        ("window", 3, [0, 7, 10], [0, 7, 12], [*range(7), 1, 2, 7, 8, 9], 3),
        ("chunk", 4, [0, 4, 7, 8, 10], [0, 4, 7, 11, 13], [*range(7), 0, 1, 2, 7, 8, 9], None),
    ],
)
def test_calls_of_the_row_of_ten(kind, size, cu_seqlens_q, cu_seqlens_k, key_index, window):
    (call,) = varlen_calls(mask_of(row_of_ten(), kind, size))
    assert call.cu_seqlens_q.tolist() == cu_seqlens_q
    assert call.cu_seqlens_k.tolist() == cu_seqlens_k
    assert call.key_index.tolist() == key_index
    assert call.window == window
