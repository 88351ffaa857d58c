"""Rows whose scan takes packed sequences: cut at forks, with the state after every piece made of two calls."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings

from support.sample_sets import sample_sets
from support.tree_masks import plan_of_eleven, tree_of
from trl_singlepass.recurrent.row_kernels import ComposeStates, ancestors, cut_at_forks


def test_the_documented_row():
    borders, source = cut_at_forks(plan_of_eleven())
    assert borders.tolist() == [0, 2, 4, 7, 9, 11]
    assert source.tolist() == [-1, 0, 1, 1, 0]
    assert [steps.tolist() for steps in ancestors(np.array([3, 0, 1, 3]))] == [[3, 0, 1, 3], [3, 3, 0, 3]]


@settings(max_examples=50)
@given(samples=sample_sets())
def test_every_piece_starts_where_its_source_ends(samples):
    tree = tree_of([samples, samples])
    borders, source = cut_at_forks(tree.plan)
    depth = tree.depth[0]
    for piece, (start, end) in enumerate(pairwise(borders)):
        assert source[piece] < piece
        assert depth[start:end].diff().eq(1).all()
        if source[piece] < 0:
            assert depth[start] == 0
        else:
            last = borders[source[piece] + 1] - 1
            assert depth[start] == depth[last] + 1
            assert tree.subtree_end[0, last] > start  # an ancestor


def test_states_and_their_gradients_are_those_of_a_loop():
    parents = [7, 0, 1, 2, 1, 4, 7]  # two roots, a chain of four and a branch
    draw = torch.Generator().manual_seed(0)
    own, transfer = (
        torch.cat([torch.randn(7, 2, 3, size, generator=draw, dtype=torch.float64), torch.zeros(1, 2, 3, size)])
        for size in (4, 3)
    )
    weights = torch.randn(own.shape, generator=draw, dtype=torch.float64)
    weights[-1] = 0  # nobody reads the gradients of zeros
    inputs = [x.requires_grad_() for x in (own, transfer)]
    steps = [torch.from_numpy(step) for step in ancestors(np.array([*parents, 7]))]
    states = ComposeStates.apply(own, transfer, steps)
    expected = [None] * 7 + [own[7]]
    for piece, parent in enumerate(parents):
        expected[piece] = own[piece] + transfer[piece] @ expected[parent]
    torch.testing.assert_close(states, torch.stack(expected), rtol=0, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad((states * weights).sum(), inputs),
        torch.autograd.grad((torch.stack(expected) * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=0, atol=1e-12)
