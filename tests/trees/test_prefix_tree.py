"""The prefix tree against its specification: a dictionary of prefixes, and TRL's own `TreeRow`."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from support.prefix_tree_reference import PrefixOracle, ancestors, prefixes
from support.sample_sets import nested_forks, reasoning_chat, sample_sets
from trl_singlepass import PrefixTree, Sample
from trl_singlepass.trees.prefix_tree import sample_paths


# Two samples train different tokens after the same prompt, and a third goes on without training.
COLLIDING = [
    Sample([1, 2, 3], [0, 0, 1], 2),
    Sample([1, 2, 4, 5], [0, 0, 1, 1], 2),
    Sample([1, 2, 6, 7], [0, 0, 0, 1], 3),
]
# A fork within a copied token: what follows the copy collides again.
NESTED = [Sample([1, 2, *rest], [0, 1, 1, 1], 1) for rest in ([3, 4], [3, 5], [6, 7], [6, 8])]


def targets_of(tree):
    """`{(prefix, target): weight}` as a row that shifts its labels by one would train them."""
    path = prefixes(tree.input_ids, tree.subtree_end)
    found = {}
    for position in np.flatnonzero(tree.labels != -100) - 1:
        key = path[position], int(tree.labels[position + 1])
        assert key not in found, "a target is trained from one position only"
        found[key] = float(tree.loss_weights[position + 1])
    return found


@given(samples=sample_sets())
@example(samples=COLLIDING)
@example(samples=NESTED)
@example(samples=reasoning_chat())
@example(samples=nested_forks())
def test_tree_stores_each_prefix_once_and_once_more_per_colliding_target(samples):
    tree, oracle = PrefixTree.from_samples(samples), PrefixOracle(samples)
    assert len(tree) == oracle.num_tokens
    assert set(prefixes(tree.input_ids, tree.subtree_end)) == set(oracle.multiplicity)


@given(samples=sample_sets())
@example(samples=COLLIDING)
@example(samples=NESTED)
def test_targets_and_weights_are_those_of_the_samples(samples):
    assert targets_of(PrefixTree.from_samples(samples)) == PrefixOracle(samples).weighted_targets


@given(samples=sample_sets())
@example(samples=COLLIDING)
@example(samples=NESTED)
def test_multiplicity_counts_the_samples_through_each_prefix(samples):
    tree, oracle = PrefixTree.from_samples(samples), PrefixOracle(samples)
    counted = {}
    for prefix, multiplicity in zip(prefixes(tree.input_ids, tree.subtree_end), tree.multiplicity, strict=True):
        counted[prefix] = counted.get(prefix, 0) + int(multiplicity)
    assert counted == dict(oracle.multiplicity)
    assert tree.num_sample_tokens == sum(map(len, samples))
    assert tree.sharing_factor == sum(map(len, samples)) / len(tree)


@given(samples=sample_sets())
def test_position_ids_count_ancestors(samples):
    tree = PrefixTree.from_samples(samples)
    assert tree.position_ids.tolist() == [len(above) - 1 for above in ancestors(tree.subtree_end)]


@given(samples=sample_sets())
@example(samples=COLLIDING)
def test_segments_cover_the_row_and_continue_their_parents(samples):
    tree = PrefixTree.from_samples(samples)
    above = ancestors(tree.subtree_end)
    assert [segment.start for segment in tree.segments] == [0, *(segment.end for segment in tree.segments[:-1])]
    assert tree.segments[-1].end == len(tree)
    for segment in tree.segments:
        positions = np.arange(segment.start, segment.end)
        assert (tree.position_ids[positions] == segment.depth + np.arange(len(positions))).all()
        assert (tree.multiplicity[positions] == segment.num_samples).all()
        parent = max(above[segment.start] - {segment.start}, default=None)
        assert (parent is None) == (segment.parent == -1)
        assert parent is None or parent == tree.segments[segment.parent].end - 1


@given(samples=sample_sets())
@example(samples=COLLIDING)
@example(samples=NESTED)
def test_every_sample_is_a_path(samples):
    tree = PrefixTree.from_samples(samples)
    above = ancestors(tree.subtree_end)
    for sample, path in zip(samples, sample_paths(tree, samples), strict=True):
        assert tree.input_ids[path].tolist() == sample.token_ids.tolist()
        assert set(path.tolist()) == above[path[-1]]
        for depth in np.flatnonzero(sample.loss_weights):
            assert tree.labels[path[depth - 1] + 1] == sample.token_ids[depth]


def test_no_sample_is_an_error():
    with pytest.raises(ValueError, match="at least one sample, got none"):
        PrefixTree.from_samples([])


@given(samples=sample_sets(), max_length=st.integers(1, 24))
@example(samples=COLLIDING, max_length=3)
def test_max_length_cuts_samples_at_the_end_and_drops_what_trains_nothing(samples, max_length):
    cut = [(sample.token_ids[:max_length], sample.loss_weights[:max_length]) for sample in samples]
    expected = [Sample(tokens, weights, 0) for tokens, weights in cut if weights.any()]
    kept = [sample.truncated(max_length) for sample in samples]
    kept = [sample for sample in kept if sample.is_trained]
    assert [sample.token_ids.tolist() for sample in kept] == [sample.token_ids.tolist() for sample in expected]
    if kept:
        tree = PrefixTree.from_samples(kept)
        assert targets_of(tree) == PrefixOracle(expected).weighted_targets
        assert (tree.position_ids < max_length).all()
