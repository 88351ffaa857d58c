"""Blocks: every visible pair of tokens is in exactly one, and the examples of the docstrings hold."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.dense_reference import dense_mask
from support.tree_masks import tree_masks
from trl_singlepass.attention.blocks import tree_blocks


@given(mask=tree_masks(("causal", "window", "chunk", "unbounded")), query_block=st.sampled_from([None, 3]))
def test_blocks_cover_every_visible_pair_and_no_key_twice(mask, query_block):
    visible = dense_mask(mask)
    covered = torch.zeros_like(visible, dtype=torch.int)
    for block in tree_blocks(mask, query_block):
        for first, last in block.keys:
            covered[block.start : block.end, first:last] += 1
    assert (covered <= 1).all()
    assert (covered.bool() | ~visible).all()
