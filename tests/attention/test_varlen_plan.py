"""Varlen calls: together they see exactly the mask, and gather no more keys than they can use."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.dense_reference import dense_mask
from support.sample_sets import reasoning_chat
from support.tree_masks import mask_of, tree_masks, tree_of
from trl_singlepass.attention import varlen_plan as varlen_plan_module
from trl_singlepass.attention.varlen_plan import varlen_plan


ALWAYS, DEFAULT = 0, varlen_plan_module.KEYS_PER_CALL
"""Rows of keys that a call gathers before the beginnings of paths are shared."""


@contextmanager
def keys_per_call(rows):
    with patch.object(varlen_plan_module, "KEYS_PER_CALL", rows):
        yield


def sequences_of(mask, heads_per_key=1):
    """Positions of the queries and the keys of every sequence that a kernel is given."""
    row = torch.arange(mask.tree.plan.length)
    for part in varlen_plan(mask, heads_per_key).passes:
        gathered, first = row if part.key_index is None else part.key_index.long(), 0
        for call in filter(None, (part.path, part.shared)):
            keys, queries = gathered[first : first + call.num_keys], row[call.start : call.end]
            first += call.num_keys
            if call is part.shared:
                queries = queries.repeat_interleave(heads_per_key)
            for i in range(len(call.cu_seqlens_q) - 1):
                yield (
                    call,
                    queries[call.cu_seqlens_q[i] : call.cu_seqlens_q[i + 1]].unique(),
                    keys[call.cu_seqlens_k[i] : call.cu_seqlens_k[i + 1]],
                )


@pytest.mark.parametrize("rows", [ALWAYS, DEFAULT])
@settings(max_examples=60)
@given(mask=tree_masks(), heads_per_key=st.integers(1, 4))
def test_calls_see_exactly_the_mask_and_no_pair_twice(rows, mask, heads_per_key):
    seen = torch.zeros_like(dense_mask(mask), dtype=torch.int)
    with keys_per_call(rows):
        for call, queries, keys in sequences_of(mask, heads_per_key):
            behind = torch.arange(len(queries))[:, None] + len(keys) - len(queries) - torch.arange(len(keys))
            visible = (behind >= 0) & (behind < (call.window or len(seen)))
            seen[queries[:, None], keys] += visible | (not call.is_causal)
            assert not call.is_causal or bool(visible.any(1).all())
    assert torch.equal(seen, dense_mask(mask).int())


@settings(max_examples=50)
@given(mask=tree_masks(("window", "chunk")))
def test_local_layers_gather_no_more_than_they_can_see(mask):
    size = mask.local_size
    for _, queries, keys in sequences_of(mask):
        assert len(keys) <= len(queries) + size - 1


@pytest.mark.parametrize(("turns", "heads_per_key"), [(80, 1), (80, 4), (200, 4)])
def test_many_branches_take_two_calls_that_share_most_of_the_history(turns, heads_per_key):
    mask = mask_of(tree_of([reasoning_chat(turns)]), "causal", 0)
    plan = varlen_plan(mask, heads_per_key)
    (part,) = plan.passes
    whole_paths = sum(run.depth + run.end - run.start for run in mask.tree.plan.runs)
    assert part.path.num_keys + part.shared.num_keys / heads_per_key < whole_paths / 4
    # The second call has all queries but those of the first run, whose path begins with no other.
    assert (part.shared.start, part.shared.end) == (mask.tree.plan.runs[0].end, mask.tree.plan.length)
    assert (plan.alone, part.shared.without_keys) == (((0, part.shared.start),), None)


def test_windows_are_gathered_in_parts():
    """Queries at different depths see different parts of a history, so that none of it can be shared."""
    mask = mask_of(tree_of([reasoning_chat(80)]), "window", 300)
    plan, length = varlen_plan(mask), mask.tree.plan.length
    keys = [len(part.key_index) for part in plan.passes]
    assert 1 < len(keys) <= sum(keys) / (4 * length) * 2 + 1
    assert max(keys) <= 4 * length


def test_a_rule_that_flash_kernels_do_not_know_is_refused():
    with pytest.raises(ValueError, match="neither causal nor a sliding window nor a chunk"):
        varlen_plan(mask_of(tree_of([reasoning_chat()]), "other", 4))
