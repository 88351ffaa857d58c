"""
Tree attention block by block: each run attends to itself and to the ranges that hold its ancestors.

Every visible pair of a query and a key is in exactly one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..trees.rows import Ranges, Run
from .block_kernels import BlockInputs, BlockKernel
from .interface import AttentionInputs, add_sinks_, sink_gradient
from .kv_cache import FetchedSlots, KVCacheView, LayerSlots
from .tree_mask import TreeMask


class BlockKind(StrEnum):
    """Which pairs of a block are visible."""

    FULL = "full"
    """All: the keys are ancestors of every query."""
    CAUSAL = "causal"
    """Keys up to the query: keys and queries are the same tokens of a run."""
    MASKED = "masked"
    """Those that the model's rule allows."""


@dataclass(frozen=True, slots=True)
class Block:
    """Queries `[start, end)` of a row against the keys in some ranges."""

    start: int
    end: int  # just past the last query
    keys: Ranges  # positions, in the order of their depth
    key_depth: int  # depth of the first key
    kind: BlockKind
    # If the queries belong to an image whose tokens see each other and the block is masked: the depth of its first
    # token, and the depth just past its last one.
    image: tuple[int, int] | None = None

    @property
    def num_keys(self) -> int:
        """Number of keys."""
        return sum(last - first for first, last in self.keys)

    def with_slots(self, slots: LayerSlots, row_length: int) -> Block:
        """Return the block with its keys past the row where a layer's cache holds them."""
        ends = slots.locate(np.array([(first, last - 1) for first, last in self.keys], np.int64), row_length)
        return replace(self, keys=tuple((first, last + 1) for first, last in ends.tolist()))


def tree_blocks(mask: TreeMask, query_block: int | None) -> list[Block]:
    """
    Return all blocks of a row; the blocks of one range of queries are neighbours.

    Where every ancestor is visible, a block has at most `query_block` queries.
    """
    if mask.is_causal:
        return [block for run in mask.plan.runs for block in causal_blocks(run, query_block)]
    return [block for run in mask.plan.runs for block in masked_blocks(run, mask.local_size)]


def causal_blocks(run: Run, query_block: int | None) -> Iterator[Block]:
    """
    Yield the blocks of a run whose tokens see all their ancestors.

    A run at positions 7 to 9 that forks off after position 2, `Run(7, 10, depth=3, prefix=((0, 3),))`, has two blocks:
    queries 7 to 9 against keys 0 to 2 (full), and against one another (causal). With at most 2 queries per block:

        queries 7, 8   keys 0-2 full   keys 7, 8 causal
        query 9        keys 0-2 full   keys 7, 8 full      key 9 causal

    If the run is an image, its own block is full as well: queries 7 to 9 see keys 7 to 9.
    """
    for start, end in _split(run.start, run.end, query_block):
        depth = 0
        for first, last in run.prefix:
            yield Block(start, end, ((first, last),), depth, BlockKind.FULL)
            depth += last - first
        if run.is_image:
            yield Block(start, end, ((run.start, run.end),), run.depth, BlockKind.FULL)
            continue
        if start > run.start:
            yield Block(start, end, ((run.start, start),), run.depth, BlockKind.FULL)
        yield Block(start, end, ((start, end),), run.depth + start - run.start, BlockKind.CAUSAL)


def masked_blocks(run: Run, local_size: int | None) -> Iterator[Block]:
    """
    Yield the blocks of a run under a rule that looks at most `local_size` tokens back.

    The run of the example above under a window of 2: its first query, at depth 3, looks back to depth 2. So there is
    one block, queries 7 to 9 against the keys 2 and 7 to 9, whose first key has depth 2. An image is seen up to its
    end by each of its queries, and some models let them look back to its start, however far.
    """
    query_block = 256 if local_size is None else min(max(64, local_size // 4), 512)
    image = (run.depth, run.depth + run.end - run.start) if run.is_image else None
    for start, end in _split(run.start, run.end, query_block):
        depth = run.depth + start - run.start
        key_depth = 0 if local_size is None else max(0, depth - local_size + 1)
        key_depth = key_depth if image is None else min(key_depth, run.depth)
        keys = _from_depth((*run.prefix, (run.start, end if image is None else run.end)), key_depth)
        yield Block(start, end, keys, key_depth, BlockKind.MASKED, image)


def _split(start: int, end: int, size: int | None) -> Iterator[tuple[int, int]]:
    size = size or end - start
    for first in range(start, end, size):
        yield first, min(first + size, end)


def _from_depth(path: Ranges, depth: int) -> Ranges:
    """A path without its first `depth` tokens: `((0, 3), (7, 10))` from depth 2 on is `((2, 3), (7, 10))`."""
    kept = []
    for first, last in path:
        skipped = min(depth, last - first)
        depth -= skipped
        if first + skipped < last:
            kept.append((first + skipped, last))
    return tuple(kept)


def block_tree_attention(
    inputs: AttentionInputs, mask: TreeMask, kernel: BlockKernel, cache: KVCacheView | None = None
) -> Tensor:
    """
    Return attention of a row of trees, `(1, row_length, heads, value_dim)`, block by block: memory linear in tokens.

    `cache` has the keys and values of ancestors outside the row.
    """
    padded = inputs.with_one_head_dim(kernel.head_dim_multiple)
    out: Tensor = BlockAttention.apply(  # type: ignore[no-untyped-call]
        padded.query, padded.key, padded.value, padded.sinks, mask, kernel, padded.scale, cache
    )
    return out[..., : inputs.value.shape[-1]].transpose(1, 2)


class BlockAttention(torch.autograd.Function):
    """
    Attention over blocks, merged by log-sum-exp; linear memory, no copy of keys or values is kept for backward.

    Shapes and meaning of the arguments are those of [`AttentionInputs`] on a row of trees; positions from `row_length`
    on are slots of the cache. Backward calls each block's own backward with the merged output and log-sum-exp, which
    is exact (as in ring attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        mask: TreeMask,
        kernel: BlockKernel,
        scale: float,
        cache: KVCacheView | None = None,
    ) -> Tensor:
        """Return the output, in the shape of the queries."""
        blocks = tree_blocks(mask, kernel.query_block)
        if cache is not None:
            cache.store(*(x.squeeze(0).transpose(0, 1) for x in (key, value)))
            blocks = [block.with_slots(cache.slots, key.shape[2]) for block in blocks]
        row = _Row(query, key, value, mask, scale, _fetch(blocks, key, cache))
        out, lse = _merged_output(row, blocks, kernel)
        if sinks is not None:
            add_sinks_(out, lse, sinks)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.blocks, ctx.mask, ctx.kernel, ctx.scale, ctx.cache = blocks, mask, kernel, scale, cache
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `query`, `key`, `value` and `sinks`, and `None` for the rest."""
        query, key, value, sinks, out, lse = ctx.saved_tensors
        cache: KVCacheView | None = ctx.cache
        fetched = _fetch(ctx.blocks, key, cache)
        row = _Row(query, key, value, ctx.mask, ctx.scale, fetched)
        grad = grads[0].contiguous() if grads[0].stride(-1) != 1 else grads[0]
        grad_query = torch.zeros_like(out)
        # History gets gradients from every branch: they are added up in float32 at least.
        dtype = torch.promote_types(key.dtype, torch.float32)
        total = torch.zeros(2, key.shape[2], key.shape[1], key.shape[3], dtype=dtype, device=key.device)
        grad_key, grad_value = _heads_first(total)
        grad_slots = None if cache is None or fetched is None else cache.gradients_of(fetched)
        grad_slot_key, grad_slot_value = (None, None) if grad_slots is None else _heads_first(grad_slots)
        for block in ctx.blocks:
            here = slice(block.start, block.end)
            dq, dk, dv = ctx.kernel.backward(grad[:, :, here], row.cut(block), out[:, :, here], lse[:, :, here])
            grad_query[:, :, here] += dq
            _add_to_ranges(grad_key, dk, block.keys, grad_slot_key, fetched)
            _add_to_ranges(grad_value, dv, block.keys, grad_slot_value, fetched)
        if cache is not None:
            if fetched is not None and grad_slots is not None:
                cache.send_back(fetched, grad_slots)
            cache.add_gradients_from_later_rows(total)
        grad_sinks = None if sinks is None else sink_gradient(grad[0], out[0], lse[0], sinks)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_sinks, None, None, None, None


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """What a row's blocks are cut from."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: TreeMask
    scale: float
    fetched: FetchedSlots | None

    def cut(self, block: Block) -> BlockInputs:
        """Return the inputs of one block; keys and values of several ranges are copied."""
        slots = self.fetched
        cached_key, cached_value = (None, None) if slots is None else _heads_first(slots.kv)
        return BlockInputs(
            query=self.query[:, :, block.start : block.end],
            key=_gather(self.key, block.keys, cached_key, slots),
            value=_gather(self.value, block.keys, cached_value, slots),
            is_causal=block.kind is BlockKind.CAUSAL,
            mask=self._visibility(block) if block.kind is BlockKind.MASKED else None,
            scale=self.scale,
        )

    def _visibility(self, block: Block) -> Tensor:
        depth = self.mask.tree.depth[0]
        key_depth = torch.arange(block.key_depth, block.key_depth + block.num_keys, device=depth.device)
        return self.mask.evaluate(depth[block.start : block.end], key_depth, block.image)


def _merged_output(row: _Row, blocks: Sequence[Block], kernel: BlockKernel) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the queries over all their blocks."""
    # In the memory order `(1, row_length, heads, head_dim)`, which layers want next.
    tokens_first = torch.empty_like(row.query.transpose(1, 2), memory_format=torch.contiguous_format)
    out = tokens_first.transpose(1, 2)
    dtype = torch.promote_types(row.query.dtype, torch.float32)
    lse = torch.empty(row.query.shape[:3], dtype=dtype, device=row.query.device)
    done = 0  # blocks of one range of queries are neighbours, so queries before this position have a first block
    for block in blocks:
        block_out, block_lse = kernel.forward(row.cut(block))
        here = slice(block.start, block.end)
        if block.end > done:
            out[:, :, here], lse[:, :, here] = block_out, block_lse
            done = block.end
        else:
            _merge_into(out[:, :, here], lse[:, :, here], block_out, block_lse)
    return out, lse


def _merge_into(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    merged = torch.logaddexp(lse, other_lse)
    keep, add = ((x - merged).exp()[..., None] for x in (lse, other_lse))
    out.copy_(out * keep + other_out * add)
    lse.copy_(merged)


def _fetch(blocks: Sequence[Block], key: Tensor, cache: KVCacheView | None) -> FetchedSlots | None:
    """Bring the ancestors outside the row onto the device, from the first to the last, once for all blocks."""
    length = key.shape[2]
    outside = [keys for block in blocks for keys in block.keys if keys[0] >= length]
    if cache is None or not outside:
        return None
    return cache.fetch(min(outside)[0] - length, max(last for _, last in outside) - length, key.device)


def _heads_first(kv: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as kernels for blocks take them, `(1, kv_heads, num_tokens, head_dim)`."""
    key, value = kv.transpose(1, 2).unsqueeze(1)
    return key, value


def _gather(x: Tensor, ranges: Ranges, cached: Tensor | None, slots: FetchedSlots | None) -> Tensor:
    parts = [_part(x, cached, slots, first, last) for first, last in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _add_to_ranges(
    total: Tensor, part: Tensor, ranges: Ranges, cached: Tensor | None, slots: FetchedSlots | None
) -> None:
    offset = 0
    for first, last in ranges:
        here = _part(total, cached, slots, first, last)
        here += part[:, :, offset : offset + last - first]
        offset += last - first


def _part(x: Tensor, cached: Tensor | None, slots: FetchedSlots | None, first: int, last: int) -> Tensor:
    """Positions `[first, last)` of the row, or of the cache, whose positions follow those of the row."""
    length = x.shape[2]
    if first < length:
        return x[:, :, first:last]
    assert cached is not None, "only a wave has ancestors outside its row"
    assert slots is not None, "what is cached was fetched"
    return cached[:, :, first - length - slots.first : last - length - slots.first]
