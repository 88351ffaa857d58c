"""Tree attention block by block: each run attends to itself and to the ranges that hold its ancestors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..trees.rows import Run
from .block_kernels import BlockKernel
from .kv_cache import MemoryAccess
from .tree_mask import TreeMask


Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Block:
    """
    Queries `[start, end)` of a row against the keys in some ranges.

    Args:
        start (`int`):
            Position of the first query.
        end (`int`):
            Position just past the last query.
        keys (`Ranges`):
            Half-open ranges of key positions, in the order of their depth.
        key_depth (`int`):
            Depth of the first key.
        kind (`str`):
            `"full"` (all keys are visible), `"causal"` (keys and queries are the same run) or `"masked"` (the model's
            rule decides).
    """

    start: int
    end: int
    keys: Ranges
    key_depth: int
    kind: str


def causal_blocks(run: Run, query_block: int | None) -> Iterator[Block]:
    """Yield the blocks of a run that sees all its ancestors; at most `query_block` queries each."""
    for start, end in _pieces(run.start, run.end, query_block):
        depth = 0
        for first, last in run.prefix:
            yield Block(start, end, ((first, last),), depth, "full")
            depth += last - first
        if start > run.start:
            yield Block(start, end, ((run.start, start),), run.depth, "full")
        yield Block(start, end, ((start, end),), run.depth + start - run.start, "causal")


def masked_blocks(run: Run, local_size: int | None) -> Iterator[Block]:
    """Yield the blocks of a run under a rule that looks at most `local_size` tokens back."""
    query_block = 256 if local_size is None else min(max(64, local_size // 4), 512)
    for start, end in _pieces(run.start, run.end, query_block):
        depth = run.depth + start - run.start
        key_depth = 0 if local_size is None else max(0, depth - local_size + 1)
        keys = _from_depth((*run.prefix, (run.start, end)), key_depth)
        yield Block(start, end, keys, key_depth, "masked")


def _pieces(start: int, end: int, size: int | None) -> Iterator[tuple[int, int]]:
    size = size or end - start
    for piece in range(start, end, size):
        yield piece, min(piece + size, end)


def _from_depth(path: Ranges, depth: int) -> Ranges:
    """Ranges of a path without its first `depth` tokens."""
    kept = []
    for first, last in path:
        skipped = min(depth, last - first)
        depth -= skipped
        if first + skipped < last:
            kept.append((first + skipped, last))
    return tuple(kept)


def tree_blocks(mask: TreeMask, query_block: int | None) -> list[Block]:
    """Return all blocks of a row under a rule, the blocks of one query range next to one another."""
    if mask.is_causal:
        return [block for run in mask.tree.plan.runs for block in causal_blocks(run, query_block)]
    return [block for run in mask.tree.plan.runs for block in masked_blocks(run, mask.local_size)]


class BlockAttention(torch.autograd.Function):
    """
    Attention over blocks, merged by log-sum-exp; linear memory, no copy of keys or values is kept for backward.

    Backward calls each block's own backward with the merged output and log-sum-exp, which is exact (as in ring
    attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        mask: TreeMask,
        kernel: BlockKernel,
        scale: float,
        memory: MemoryAccess | None = None,
    ) -> torch.Tensor:
        """
        Compute the output.

        Args:
            ctx (`Any`):
                Autograd context.
            query (`torch.Tensor` of shape `(1, heads, row_length, head_dim)`):
                Queries.
            key (`torch.Tensor` of shape `(1, kv_heads, row_length, head_dim)`):
                Keys.
            value (`torch.Tensor` of shape `(1, kv_heads, row_length, head_dim)`):
                Values.
            sinks (`torch.Tensor` of shape `(heads,)`, *optional*):
                Logit per head of a key without value (gpt-oss).
            mask (`TreeMask`):
                Rule of the layer.
            kernel (`BlockKernel`):
                Code that computes one block.
            scale (`float`):
                Factor of the scores.
            memory (`MemoryAccess`, *optional*):
                Keys and values of ancestors outside the row. Their positions follow those of the row.

        Returns:
            `torch.Tensor` of shape `(1, heads, row_length, head_dim)`: The output.
        """
        if memory is not None:
            memory.remember(key, value)
        dtype = torch.promote_types(query.dtype, torch.float32)
        out = _like_layer_output(query)
        lse = torch.empty(query.shape[:3], dtype=dtype, device=query.device)
        blocks = tree_blocks(mask, kernel.query_block)
        if memory is not None:
            blocks = [replace(block, keys=memory.places(block.keys, key.shape[2])) for block in blocks]
        done = 0  # blocks of one query range are neighbours, so queries before this position have a first block
        for block in blocks:
            o, m = kernel.forward(*_operands(query, key, value, block, memory), *_visibility(mask, block), scale)
            here = slice(block.start, block.end)
            if block.end > done:
                out[:, :, here], lse[:, :, here] = o, m
                done = block.end
            else:
                _merge_into(out[:, :, here], lse[:, :, here], o, m)
        if sinks is not None:
            merged = torch.logaddexp(lse, sinks.to(dtype)[None, :, None])
            out *= (lse - merged).exp()[..., None].to(out.dtype)
            lse = merged
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.blocks, ctx.mask, ctx.kernel, ctx.scale, ctx.memory = blocks, mask, kernel, scale, memory
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """
        Compute the gradients.

        Args:
            ctx (`Any`):
                Autograd context.
            *grads (`torch.Tensor` of shape `(1, heads, row_length, head_dim)`):
                Gradient of the output.

        Returns:
            `tuple`: Gradients of `query`, `key`, `value` and `sinks`; `None` for the rest.
        """
        query, key, value, sinks, out, lse = ctx.saved_tensors
        memory: MemoryAccess | None = ctx.memory
        grad = grads[0].contiguous() if grads[0].stride(-1) != 1 else grads[0]
        grad_query = torch.zeros_like(out)
        # History gets gradients from every branch: add them up in float32 at least.
        dtype = torch.promote_types(key.dtype, torch.float32)
        grad_key, grad_value = (torch.zeros_like(x, dtype=dtype) for x in (key, value))
        for block in ctx.blocks:
            here = slice(block.start, block.end)
            dq, dk, dv = ctx.kernel.backward(
                grad[:, :, here],
                *_operands(query, key, value, block, memory),
                out[:, :, here],
                lse[:, :, here],
                *_visibility(ctx.mask, block),
                ctx.scale,
            )
            grad_query[:, :, here] += dq
            _add_to_ranges(grad_key, dk, block.keys, None if memory is None else memory.grad_key)
            _add_to_ranges(grad_value, dv, block.keys, None if memory is None else memory.grad_value)
        if memory is not None:
            memory.collect(grad_key, grad_value)
        grad_sinks = None if sinks is None else sink_gradient(grad, out, lse, sinks)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_sinks, None, None, None, None


def _like_layer_output(query: torch.Tensor) -> torch.Tensor:
    """Empty output in the memory order `(1, row_length, heads, head_dim)`, which layers want next."""
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _operands(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: Block, memory: MemoryAccess | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys = _gather(key, block.keys, None if memory is None else memory.key)
    values = _gather(value, block.keys, None if memory is None else memory.value)
    return query[:, :, block.start : block.end], keys, values


def _gather(x: torch.Tensor, ranges: Ranges, outside: torch.Tensor | None) -> torch.Tensor:
    parts = [_part(x, outside, first, last).to(x.device) for first, last in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _add_to_ranges(total: torch.Tensor, part: torch.Tensor, ranges: Ranges, outside: torch.Tensor | None) -> None:
    offset = 0
    for first, last in ranges:
        here = _part(total, outside, first, last)
        here += part[:, :, offset : offset + last - first].to(here.device)
        offset += last - first


def _part(x: torch.Tensor, outside: torch.Tensor | None, first: int, last: int) -> torch.Tensor:
    """Positions `[first, last)`; those of the row come first, those outside of it follow."""
    length = x.shape[2]
    if first < length:
        return x[:, :, first:last]
    assert outside is not None, "only a wave has ancestors outside its row"
    return outside[:, :, first - length : last - length]


def _visibility(mask: TreeMask, block: Block) -> tuple[bool, torch.Tensor | None]:
    if block.kind != "masked":
        return block.kind == "causal", None
    depth = mask.tree.depth[0]
    num_keys = sum(last - first for first, last in block.keys)
    key_depth = torch.arange(block.key_depth, block.key_depth + num_keys, device=depth.device)
    return False, mask.between(depth[block.start : block.end], key_depth)


def _merge_into(out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor) -> None:
    merged = torch.logaddexp(lse, other_lse)
    keep, add = ((x - merged).exp()[..., None] for x in (lse, other_lse))
    out.copy_(out * keep + other_out * add)
    lse.copy_(merged)


def sink_gradient(grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """A sink has weight `exp(sink - lse)` and no value, so its gradient is `-Σ weight · rowsum(grad · out)`."""
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    weight = (sinks.to(lse.dtype)[None, :, None] - lse).exp()
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)
