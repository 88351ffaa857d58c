"""Rows keep their trees apart, and their plan lists the ancestors of every run."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from support.prefix_tree_reference import ancestors, labels_of, prefixes
from support.sample_sets import sample_sets
from trl_singlepass import PrefixTree, Sample
from trl_singlepass.trees.rows import ROW_COLUMNS, Row, Run, TreePlan, tree_ends


@given(sets=st.lists(sample_sets(max_samples=3), min_size=1, max_size=3))
def test_rows_keep_their_trees_apart(sets):
    trees = [PrefixTree.from_samples(samples) for samples in sets]
    row = Row.join([Row.from_tree(tree) for tree in trees])
    expected = [path for tree in trees for path in prefixes(tree.input_ids, tree.subtree_end)]
    assert prefixes(row.input_ids, row.subtree_end) == expected
    assert row.token_weights.tolist() == np.concatenate([tree.token_weights for tree in trees]).tolist()
    assert all(
        np.array_equal(getattr(Row.from_columns(row.columns()), name), getattr(row, name)) for name in ROW_COLUMNS
    )
    assert row.targets(TreePlan.from_subtree_end(row.subtree_end)).labels.tolist() == labels_of(row)
    parts = row.split()
    assert all(tree_ends(part.subtree_end) == [len(part)] for part in parts)
    assert all(np.array_equal(getattr(Row.join(parts), name), getattr(row, name)) for name in ROW_COLUMNS)


@given(sets=st.lists(sample_sets(max_samples=3), min_size=1, max_size=3))
def test_a_plan_lists_the_ancestors_of_each_run(sets):
    row = Row.join([Row.from_tree(PrefixTree.from_samples(samples)) for samples in sets])
    plan, above = TreePlan.from_subtree_end(row.subtree_end), ancestors(row.subtree_end)
    assert plan.length == len(row)
    assert [position for run in plan.runs for position in range(run.start, run.end)] == list(range(len(row)))
    for run in plan.runs:
        prefix = [position for start, end in run.prefix for position in range(start, end)]
        for position in range(run.start, run.end):
            assert above[position] == {*prefix, *range(run.start, position + 1)}
    assert plan.depths().tolist() == [len(item) - 1 for item in above]


def test_the_tree_of_the_glossary():
    tree = PrefixTree.from_samples([Sample([1, 2, 3], [0] * 3, 2), Sample([1, 2, 4, 5], [0] * 4, 2)])
    assert tree.input_ids.tolist() == [1, 2, 4, 5, 3]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert tree.subtree_end.tolist() == [5, 5, 4, 4, 5]
    assert tree.multiplicity.tolist() == [2, 2, 1, 1, 1]
    assert [(segment.start, segment.end) for segment in tree.segments] == [(0, 2), (2, 4), (4, 5)]
    assert TreePlan.from_subtree_end(tree.subtree_end).runs == (Run(0, 4, 0, ()), Run(4, 5, 2, ((0, 2),)))
