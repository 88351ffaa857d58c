"""FlexAttention's block mask equals the dense mask, for all rules and block sizes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.dense_reference import dense_mask
from support.sample_sets import reasoning_chat
from support.tree_masks import mask_of, tree_masks, tree_of
from trl_singlepass.attention.block_mask import build_block_mask, build_mask_mod


ANY_RULE = ("causal", "window", "chunk", "other", "unbounded")


def blocks(dense, block_size):
    """For each block of a dense mask, whether any pair is visible, and whether all are, with the rows that exist."""
    length = len(dense)
    rows, columns = (range(0, length, size) for size in block_size)
    cut = [[dense[i : i + block_size[0], j : j + block_size[1]] for j in columns] for i in rows]
    any_ = torch.tensor([[bool(block.any()) for block in row] for row in cut])
    all_ = torch.tensor([[bool(block.all()) and block.shape[1] == block_size[1] for block in row] for row in cut])
    return any_, all_


def listed(num_blocks, indices):
    """Dense map of the blocks that a table of `BlockMask` lists."""
    out = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, (count, columns) in enumerate(zip(num_blocks[0, 0].tolist(), indices[0, 0], strict=True)):
        out[row, columns[:count].long()] = True
    return out


@settings(max_examples=150)
@given(mask=tree_masks(ANY_RULE), block_size=st.sampled_from([(4, 4), (8, 4), (4, 8), (16, 16), (128, 128)]))
def test_block_mask_equals_the_dense_mask(mask, block_size):
    dense, result = dense_mask(mask), build_block_mask(mask, block_size)
    some, every = blocks(dense, block_size)
    full = listed(result.full_kv_num_blocks, result.full_kv_indices)
    partial = listed(result.kv_num_blocks, result.kv_indices)
    assert not (full & partial).any()
    if mask.rule is None:  # of a rule that we do not know, no block is computed unseen
        assert not full.any()
        assert bool((some <= partial).all())
    else:
        assert torch.equal(full, every)
        assert torch.equal(full | partial, some)
    assert torch.equal(listed(result.full_q_num_blocks, result.full_q_indices), full.T)
    assert torch.equal(listed(result.q_num_blocks, result.q_indices), partial.T)
    position = torch.arange(len(dense))
    assert torch.equal(build_mask_mod(mask)(0, 0, position[:, None], position[None, :]), dense)
    assert result.shape[-2:] == dense.shape


def test_block_mask_skips_other_branches():
    mask = mask_of(tree_of([reasoning_chat(16)]), "causal", 0)
    assert build_block_mask(mask, (16, 16)).sparsity() > 65
