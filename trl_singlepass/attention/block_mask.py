"""FlexAttention's `BlockMask` of a tree, from the runs of the row: no token pair is looked at to build it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention.flex_attention import BlockMask

from .paths import Ints, KeyRanges, Pieces, key_ranges
from .rules import rule_of
from .tree_mask import TreeMask


Bools = NDArray[np.bool_]
_TABLES = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
)  # fmt: skip
MaskMod = Callable[[Any, Any, Any, Any], Any]


def block_mask_of(mask: TreeMask, block_size: tuple[int, int]) -> BlockMask:
    """
    Return the `BlockMask` of a mask type.

    Blocks of queries × keys are skipped, computed without looking at the mask (full), or computed pair by pair
    (partial). Which is which follows from the runs of the row, on the host: the device is not asked for anything.

    Args:
        mask (`TreeMask`):
            Mask type of the model.
        block_size (`tuple[int, int]`):
            Number of queries and of keys in a block.

    Returns:
        `torch.nn.attention.flex_attention.BlockMask`: The mask, on the device of the tree.
    """
    visible, full = _block_maps(mask, block_size)
    partial = visible & ~full
    # By query block for the forward pass, and by key block for the gradients of keys.
    listed = [table for blocks in (partial, full, partial.T, full.T) for table in _listed(blocks)]
    tensors = _to_device(listed, mask.tree.depth.device)
    length = mask.tree.plan.length
    tables: dict[str, Any] = dict(zip(_TABLES, tensors, strict=True))
    return BlockMask((length, length), **tables, BLOCK_SIZE=block_size, mask_mod=mask_mod_of(mask))


def mask_mod_of(mask: TreeMask) -> MaskMod:
    """
    Return the mask as FlexAttention's function of token pairs, reading three integers per token.

    Args:
        mask (`TreeMask`):
            Mask type of the model.
    """
    end, depth = (x[0].to(torch.int32) for x in (mask.tree.subtree_end, mask.tree.depth))
    rule = rule_of(mask)
    if rule is None:
        own_rule = mask.mask_function

        def general(batch: Any, head: Any, query: Any, key: Any) -> Any:
            is_ancestor = (key <= query) & (query < end[key])
            return is_ancestor & own_rule(batch, head, depth[query], depth[key])

        return general
    if rule.kind == "causal":

        def causal(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return (key <= query) & (query < end[key])

        return causal
    # The size of a window or chunk as a tensor, never as a number: a number would be compiled in, once per size.
    first_depth = rule.first_depth(depth)

    def local(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query < end[key]) & (depth[key] >= first_depth[query])

    return local


def _block_maps(mask: TreeMask, block_size: tuple[int, int]) -> tuple[Bools, Bools]:
    """Maps of shape `(query blocks, key blocks)`: where some pair is visible, and where all pairs are."""
    plan, (query_size, key_size) = mask.tree.plan, block_size
    pieces = Pieces.from_plan(plan, query_size)
    rule = rule_of(mask)
    if rule is not None:
        first, last = rule.first_depth(pieces.depth), rule.first_depth(pieces.last_depth)
    else:  # all that is known of the rule is how far back it looks
        first = pieces.depth * 0 if mask.local_size is None else pieces.depth - (mask.local_size - 1)
        last = pieces.last_depth + 1  # no key is visible for sure
    block = pieces.start // query_size
    shape = (-(-plan.length // query_size), -(-plan.length // key_size))
    seen = key_ranges(plan, pieces, first, before=pieces.end)
    visible = _coverage(block, seen, seen.start // key_size, -(-seen.end // key_size), shape) > 0
    # All queries of a piece see a key when the first one does and the last one still does.
    certain = key_ranges(plan, pieces, last, before=pieces.start + 1)
    inside = _coverage(block, certain, -(-certain.start // key_size), certain.end // key_size, shape)
    return visible, inside == np.bincount(block, minlength=shape[0])[:, None]


def _coverage(block: Ints, ranges: KeyRanges, first: Ints, end: Ints, shape: tuple[int, int]) -> Ints:
    """For each query block and key block, the number of ranges that cover the latter: +1 where one starts, -1 past."""
    kept = first < end
    row = block[ranges.piece[kept]] * (shape[1] + 1)
    size = shape[0] * (shape[1] + 1)
    change = np.bincount(row + first[kept], minlength=size) - np.bincount(row + end[kept], minlength=size)
    return change.reshape(shape[0], -1)[:, :-1].cumsum(1)


def _listed(blocks: Bools) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Number of blocks in each row, and their columns at the front of a table as wide as the row."""
    row, column = np.nonzero(blocks)
    count = np.bincount(row, minlength=len(blocks))
    table = np.zeros(blocks.shape, np.int32)
    table[row, np.arange(len(row)) - (np.cumsum(count) - count)[row]] = column
    return count.astype(np.int32), table


def _to_device(arrays: list[NDArray[np.int32]], device: torch.device) -> list[torch.Tensor]:
    """Arrays with the batch and head dimensions of `BlockMask`, moved in one copy."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(device, non_blocking=True)
    parts = torch.split(flat, [array.size for array in arrays])
    tables = [part.view(1, 1, *array.shape) for part, array in zip(parts, arrays, strict=True)]
    for table in tables:  # or the first row's number of blocks would be compiled in
        torch._dynamo.maybe_mark_dynamic(table, list(range(2, table.dim())))
    return tables
