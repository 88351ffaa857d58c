"""The prefix tree against its specification: a dictionary of prefixes, and TRL's own `TreeRow`."""

from itertools import pairwise

import numpy as np
import pytest
import torch
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
    path, targets = prefixes(tree.input_ids, tree.subtree_end), tree.targets
    found = {}
    for position in np.flatnonzero(targets.labels != -100) - 1:
        key = path[position], int(targets.labels[position + 1])
        assert key not in found, "a target is trained from one position only"
        found[key] = float(targets.loss_weights[position + 1])
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
def test_subtrees_are_nested_intervals(samples):
    tree = PrefixTree.from_samples(samples)
    positions = np.arange(len(tree))
    assert (tree.subtree_end > positions).all()
    assert (tree.subtree_end <= len(tree)).all()
    for position, above in enumerate(ancestors(tree.subtree_end)):
        assert all(tree.subtree_end[position] <= tree.subtree_end[j] for j in above)


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


@given(samples=sample_sets(), data=st.data())
def test_the_order_of_samples_changes_nothing_but_the_layout(samples, data):
    a = PrefixTree.from_samples(samples)
    b = PrefixTree.from_samples(data.draw(st.permutations(samples)))
    assert len(a) == len(b)
    assert targets_of(a) == targets_of(b)
    assert sorted(prefixes(a.input_ids, a.subtree_end)) == sorted(prefixes(b.input_ids, b.subtree_end))


@given(samples=sample_sets(), copies=st.integers(2, 3))
def test_duplicates_add_weight_and_no_tokens(samples, copies):
    once, often = PrefixTree.from_samples(samples), PrefixTree.from_samples(samples * copies)
    assert len(once) == len(often)
    assert targets_of(often) == {key: copies * weight for key, weight in targets_of(once).items()}
    assert often.num_sample_tokens == copies * once.num_sample_tokens


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


def trl_tree(samples):
    packing = pytest.importorskip("trl.experimental.async_grpo.packing")
    row = packing.TreeRow()
    for index, sample in enumerate(samples):
        row.add(
            {
                "input_ids": torch.tensor(sample.token_ids),
                "completion_mask": torch.tensor(sample.loss_weights > 0).long(),
                "old_log_probs": torch.zeros(len(sample)),
                "advantage": 1.0,
                "group_id": index,
            }
        )
    return row.pack()


def trl_nodes(packed):
    """`{(prefix, depth, next-token label)}` of TRL's row, each prefix read off the path it gathers K/V from."""
    queries = pairwise(packed["tree_cu_seqlens_q"].tolist())
    keys = pairwise(packed["tree_cu_seqlens_k"].tolist())
    nodes = set()
    for (q0, q1), (k0, k1) in zip(queries, keys, strict=True):
        path = packed["tree_kv_index"][k0:k1].tolist()
        for position in range(q0, q1):
            prefix = tuple(packed["input_ids"][path[: path.index(position) + 1]].tolist())
            nodes.add((prefix, int(packed["position_ids"][position]), int(packed["shift_labels"][position])))
    return nodes


@given(samples=sample_sets(weights=(0.0, 1.0)))
@example(samples=COLLIDING)
@example(samples=NESTED)
@example(samples=reasoning_chat())
@example(samples=nested_forks())
def test_trl_tree_row_agrees_up_to_its_forks(samples):
    tree = PrefixTree.from_samples(samples)
    shifted = np.append(tree.labels[1:], -100)
    ours = set(
        zip(prefixes(tree.input_ids, tree.subtree_end), tree.position_ids.tolist(), shifted.tolist(), strict=True)
    )
    theirs = trl_nodes(trl_tree(samples))
    # TRL forks before every divergence, so it also has copies that train nothing beside copies that do.
    assert ours <= theirs
    assert {node for node in theirs if node[2] != -100} == {node for node in ours if node[2] != -100}
    assert {node[:2] for node in theirs} == {node[:2] for node in ours}
