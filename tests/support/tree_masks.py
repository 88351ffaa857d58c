"""Trees without a model: masks of every rule that transformers builds, on the trees of random samples."""

import numpy as np
import torch
from hypothesis import strategies as st
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from support.gpu_or_cpu import on_device
from support.sample_sets import sample_sets
from trl_singlepass import Sample
from trl_singlepass.attention.context import Tree
from trl_singlepass.attention.interface import AttentionInputs
from trl_singlepass.attention.tree_mask import TreeMask
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row, Run, TreePlan


def tree_of(sample_sets):
    """Return the `Tree` of one row that holds a tree per sample set."""
    rows = [Row.from_tree(PrefixTree.from_samples(samples)) for samples in sample_sets]
    plan = TreePlan.from_rows(rows)
    return Tree(plan, torch.from_numpy(Row.join(rows).subtree_end)[None], torch.from_numpy(plan.depths())[None])


def row_of_ten():
    """Return the row of the docstrings' examples: a history of three tokens, and branches of four and three."""
    subtree_end = np.array([10, 10, 10, 7, 7, 7, 7, 10, 10, 10])
    plan = TreePlan.from_subtree_end(subtree_end)
    return Tree(plan, torch.from_numpy(subtree_end)[None], torch.from_numpy(plan.depths())[None])


def plan_of_eleven():
    """Return the row of the examples of waves and recurrent layers: a trunk of seven tokens and branches of two."""
    return TreePlan.from_subtree_end(np.array([11, 11, 9, 9, 7, 7, 7, 9, 9, 11, 11]))


def chat(turns, step=300, branch=700):
    """A history that grows by 300 tokens a turn, and for each turn a branch of 700: on the meta device."""
    runs = [Run(0, turns * step + branch, 0, ())]
    for turn in reversed(range(1, turns)):
        runs.append(Run(runs[-1].end, runs[-1].end + branch, turn * step, ((0, turn * step),)))
    length = runs[-1].end
    integers = torch.empty(1, length, dtype=torch.long, device="meta")
    return Tree(TreePlan(length, tuple(runs)), integers, integers)


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
    if kind == "unbounded":  # a rule that is none of these, and looks back as far as it likes
        return TreeMask(tree, and_masks(odd_depths_see_even_depths, causal_mask_function))
    return TreeMask(tree, and_masks(odd_depths_see_even_depths, sliding_window_causal_mask_function(size)), size)


@st.composite
def tree_masks(draw, kinds=("causal", "window", "chunk")):
    sets = draw(st.lists(sample_sets(max_samples=5, max_length=20), min_size=1, max_size=3))
    return mask_of(tree_of(sets), draw(st.sampled_from(kinds)), draw(st.integers(1, 9)))


def random_inputs(
    tree, *, heads=4, kv_heads=2, head_dim=8, value_dim=None, softcap=None, sinks=False, dtype=torch.float64
):
    """Return `AttentionInputs` of a row that require gradients."""
    generator, length = torch.Generator().manual_seed(tree.plan.length), tree.plan.length

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    query, key = draw(1, heads, length, head_dim), draw(1, kv_heads, length, head_dim)
    value = draw(1, kv_heads, length, head_dim if value_dim is None else value_dim)
    return AttentionInputs(query, key, value, 0.3, softcap, draw(heads) if sinks else None)


def on_meta(record):
    """Return a `Tree` or `AttentionInputs` whose tensors are on the meta device: shapes and dtypes without numbers."""
    return on_device(record, "meta")


def output_and_gradients(attention, inputs):
    """Return `[out, gradients of queries, keys, values and, if there are any, sinks]` of a function of inputs."""
    out = attention(inputs)
    weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
    tensors = [inputs.query, inputs.key, inputs.value, *([] if inputs.sinks is None else [inputs.sinks])]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


def assert_same(actual, expected):
    """Compare what `output_and_gradients` returned: 1e-12, of the largest number where that is above 1."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * max(1.0, float(other.abs().max())))


def long_branches(length):
    """Two samples of `2 · length` tokens that share the first half."""
    history = [7] * length
    return [Sample.from_prompt_and_completion(history, [first] * length) for first in (8, 9)]
