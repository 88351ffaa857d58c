"""Rows that are merged hold what one tree of all their samples holds, and prefixes that can be shared cost nothing."""

from hypothesis import given, settings
from hypothesis import strategies as st

from support.float64_comparison import one_row_each
from support.prefix_tree_reference import PrefixOracle, contents
from support.sample_sets import sample_sets, with_system
from trl_singlepass import PrefixTree
from trl_singlepass.trees.rows import Row
from trl_singlepass.trees.sharing import join_with_shared_prefixes, merge_rows, shareable_length


@given(st.lists(sample_sets(), min_size=1, max_size=3))
def test_merged_rows_hold_what_the_tree_of_all_samples_holds(sets):
    row = merge_rows(one_row_each(sets))
    oracle = PrefixOracle([sample for samples in sets for sample in samples])
    assert len(row) == oracle.num_tokens
    assert contents(row) == (oracle.weighted_targets, dict(oracle.multiplicity))


@settings(max_examples=40)
@given(st.lists(sample_sets(), min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_the_order_of_conversations_changes_nothing(sets, random):
    shuffled = random.sample(sets, len(sets))
    one, other = (join_with_shared_prefixes(one_row_each(map(with_system, of))) for of in (sets, shuffled))
    assert len(one) == len(other)
    assert contents(one) == contents(other)


@given(sample_sets())
def test_what_is_shareable_costs_nothing_twice(samples):
    row = Row.from_tree(PrefixTree.from_samples(samples))
    length = shareable_length(row.token_weights > 0, row.subtree_end)
    assert len(merge_rows([row, row])) <= 2 * len(row) - length
