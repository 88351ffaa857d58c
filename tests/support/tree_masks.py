"""Trees without a model: masks of every rule that transformers builds, on the trees of random samples."""

import torch
from hypothesis import strategies as st
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from support.sample_sets import sample_sets
from trl_singlepass.attention.context import Tree
from trl_singlepass.attention.tree_mask import TreeMask
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row, TreePlan


def tree_of(sample_sets):
    """Return the `Tree` of one row that holds a tree per sample set."""
    rows = [Row.from_tree(PrefixTree.from_samples(samples)) for samples in sample_sets]
    plan = TreePlan.from_rows(rows)
    return Tree(plan, torch.from_numpy(Row.join(rows).subtree_end)[None], torch.from_numpy(plan.depths())[None])


def odd_depths_see_even_depths(batch, head, query, key):
    return (query + key) % 2 == 0


def mask_of(tree, kind, size):
    """Return the `TreeMask` that transformers' mask functions of a kind of layer give."""
    if kind == "causal":
        return TreeMask(tree, causal_mask_function)
    if kind == "window":
        return TreeMask(tree, sliding_window_causal_mask_function(size), size)
    if kind == "chunk":
        return TreeMask(tree, chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long)), size)
    return TreeMask(tree, and_masks(odd_depths_see_even_depths, sliding_window_causal_mask_function(size)), size)


@st.composite
def tree_masks(draw, kinds=("causal", "window", "chunk")):
    sets = draw(st.lists(sample_sets(max_samples=5, max_length=20), min_size=1, max_size=3))
    return mask_of(tree_of(sets), draw(st.sampled_from(kinds)), draw(st.integers(1, 9)))
