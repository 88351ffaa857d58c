"""FlexAttention's `BlockMask` of a tree, from the runs of the row: no token pair is looked at to build it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..trees.rows import TreePlan
from .key_ranges import Ints, KeyRanges, Pieces, concatenated_ranges, key_ranges
from .mask_rules import MaskRule, RuleKind
from .tree_mask import TreeMask


_TABLES = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
)  # fmt: skip
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def build_block_mask(mask: TreeMask, block_size: tuple[int, int]) -> BlockMask:
    """
    Return the `BlockMask` of a mask type, on the device of the tree, for blocks of `block_size` queries × keys.

    A block of queries × keys is skipped, computed without looking at the mask (full), or computed pair by pair
    (partial). Which is which follows from the runs of the row, on the host, without waiting for the device.

    The row of ten tokens in `key_ranges.py`, causal, in blocks of 2 × 2 (f: full, p: partial):

        keys            0-1  2-3  4-5  6-7  8-9      kv_num_blocks  full_kv_num_blocks
        queries 0-1      p                                 1                0
        queries 2-3      f    p                            1                1
        queries 4-5      f    f    p                       1                2
        queries 6-7      f    p    p    p                  3                1
        queries 8-9      f    p         p    p             3                1
    """
    length = mask.plan.length
    shape = (-(-length // block_size[0]), -(-length // block_size[1]))
    partial, full = _blocks(mask, block_size, shape)
    # By query block for the forward pass, and by key block for the gradients of keys.
    by_query = [_table(blocks // shape[1], blocks % shape[1], shape) for blocks in (partial, full)]
    by_key = [_table(*_sorted_by_key(blocks, shape[1]), shape[::-1]) for blocks in (partial, full)]
    tables: dict[str, Any] = dict(zip(_TABLES, _to_device([*by_query, *by_key], mask.tree.depth.device), strict=True))
    return BlockMask((length, length), **tables, BLOCK_SIZE=block_size, mask_mod=build_mask_mod(mask))


def build_mask_mod(mask: TreeMask) -> MaskMod:
    """Return the mask as FlexAttention's function of token pairs; it reads three integers per token."""
    end, depth = (x[0].to(torch.int32) for x in (mask.tree.subtree_end, mask.tree.depth))
    rule = mask.rule
    if rule is None:
        own_rule = mask.mask_function

        def general(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            is_ancestor = (key <= query) & (query < end[key])
            return is_ancestor & own_rule(batch, head, depth[query], depth[key])

        return general
    if rule.images:
        return _mask_mod_with_images(mask.plan, rule, end, depth)
    if rule.kind is RuleKind.CAUSAL:

        def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < end[key])

        return causal
    # The size of a window or chunk as a tensor, never as a number: a number would be compiled in, once per size.
    first_depth = rule.first_depth(depth)

    def local(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key]) & (depth[key] >= first_depth[query])

    return local


def _mask_mod_with_images(plan: TreePlan, rule: MaskRule, end: Tensor, depth: Tensor) -> MaskMod:
    """The mask of a rule under which a token of an image sees its image up to the end."""
    position = np.arange(plan.length)
    visible_end, image_start = position + 1, position.copy()
    for run in plan.runs:
        if run.is_image:
            visible_end[run.start : run.end], image_start[run.start : run.end] = run.end, run.start
    moved = torch.from_numpy(np.stack([visible_end, image_start])).to(depth.device, non_blocking=True)
    visible_end_, image_depth = moved[0].to(torch.int32), depth[moved[1]]
    first_depth = rule.first_depth(depth, image_depth)

    def with_images(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # A later token of the query's image has the query before it, so the second test holds for it as well.
        return (key < visible_end_[query]) & (query < end[key]) & (depth[key] >= first_depth[query])

    return with_images


def _blocks(mask: TreeMask, block_size: tuple[int, int], shape: tuple[int, int]) -> tuple[Ints, Ints]:
    """
    Sorted codes, `query block × number of key blocks + key block`, of blocks with some visible pairs and with all.

    All queries of a piece see a key when the first one does and the last one still does. In the example above, the
    codes are 0, 6, 12, 16, … (query block 3, key block 1 is `3 × 5 + 1`) and 5, 10, 11, 15, 20.
    """
    plan, (query_size, key_size) = mask.plan, block_size
    pieces = Pieces.from_plan(plan, query_size)
    rule = mask.rule
    is_image = np.array([run.is_image for run in plan.runs], np.bool_)[pieces.run]
    run_end = np.array([run.end for run in plan.runs], np.int64)[pieces.run]
    if rule is not None:
        run_depth = np.array([run.depth for run in plan.runs], np.int64)[pieces.run]
        first = rule.first_depth(pieces.depth, np.where(is_image, run_depth, pieces.depth))
        last = rule.first_depth(pieces.last_depth, np.where(is_image, run_depth, pieces.last_depth))
    else:  # of this rule we only know how far back it looks
        first = pieces.depth * 0 if mask.local_size is None else pieces.depth - (mask.local_size - 1)
        last = pieces.last_depth + 1  # no key is certainly visible
    block = pieces.start // query_size
    some = key_ranges(plan, pieces, first, before=np.where(is_image, run_end, pieces.end))
    every = key_ranges(plan, pieces, last, before=np.where(is_image, run_end, pieces.start + 1))
    visible = np.unique(_codes(block, some, some.start // key_size, -(-some.end // key_size), shape))
    inside, pieces_inside = np.unique(
        _codes(block, every, -(-every.start // key_size), every.end // key_size, shape), return_counts=True
    )
    full = inside[pieces_inside == np.bincount(block, minlength=shape[0])[inside // shape[1]]]
    return np.setdiff1d(visible, full, assume_unique=True), full


def _codes(block: Ints, ranges: KeyRanges, first: Ints, end: Ints, shape: tuple[int, int]) -> Ints:
    return concatenated_ranges(block[ranges.piece] * shape[1] + first, np.maximum(end - first, 0))


def _sorted_by_key(blocks: Ints, num_key_blocks: int) -> tuple[Ints, Ints]:
    """Key block and query block of codes, in the order of the former."""
    order = np.argsort(blocks % num_key_blocks, kind="stable")
    return blocks[order] % num_key_blocks, blocks[order] // num_key_blocks


def _table(row: Ints, column: Ints, shape: tuple[int, int]) -> tuple[Ints, Ints, Ints, tuple[int, int]]:
    """
    Number of blocks in each row, and the table of their columns: its filled places, their values, its shape.

    The full blocks of the example are `(1, 0) (2, 0) (2, 1) (3, 0) (4, 0)`. Their counts are 0, 1, 2, 1, 1, and of the
    5 × 5 table, the places 5, 10, 11, 15, 20 hold 0, 0, 1, 0, 0.
    """
    count = np.bincount(row, minlength=shape[0])
    slot = np.arange(len(row)) - (np.cumsum(count) - count)[row]
    return count, row * shape[1] + slot, column, shape


def _to_device(tables: list[tuple[Ints, Ints, Ints, tuple[int, int]]], device: torch.device) -> Iterator[Tensor]:
    """Counts and tables as `BlockMask` takes them; only filled places are moved to the device, in two copies."""
    counts = np.concatenate([count for count, *_ in tables]).astype(np.int32)
    sizes = [shape[0] * shape[1] for *_, shape in tables]
    offsets = np.cumsum(sizes) - sizes
    place = np.concatenate([offset + place for offset, (_, place, _, _) in zip(offsets, tables, strict=True)])
    column = np.concatenate([column for _, _, column, _ in tables])
    moved = torch.from_numpy(np.stack([place, column])).to(device, non_blocking=True)
    flat = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
    flat[moved[0]] = moved[1].int()
    moved_counts = torch.from_numpy(counts).to(device, non_blocking=True)
    split_counts = torch.split(moved_counts, [len(count) for count, *_ in tables])
    for count, table, (*_, shape) in zip(split_counts, torch.split(flat, sizes), tables, strict=True):
        # Copies, because the offset of a view is compiled in where it happens to equal a size; and marked as dynamic,
        # or the number of blocks of the first row is compiled in.
        for tensor in (count.view(1, 1, -1).clone(), table.view(1, 1, *shape).clone()):
            torch._dynamo.maybe_mark_dynamic(tensor, list(range(2, tensor.dim())))
            yield tensor
