"""Varlen calls of a row: which keys each run of queries is given, in plain integers made on the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .key_ranges import Ints, Pieces, concatenated_ranges, key_ranges
from .mask_rules import MaskRule, RuleKind
from .tree_mask import TreeMask


# Most keys that one call gathers, as a multiple of the row's tokens: bounds memory where many branches share a long
# history.
KEYS_PER_CALL = 4


@dataclass(frozen=True, slots=True, eq=False)
class VarlenCall:
    """
    One call of a varlen kernel: sequences of queries that lie together in the row, each against the end of its path.

    Queries are aligned with the end of their keys ("bottom-right"), as flash kernels are when `causal`: the last query
    sees the last key. A path is contiguous in depth, so the kernel's sliding window is a window by depth.

    Args:
        start (`int`):
            Position of the first query in the row.
        end (`int`):
            Position just past the last query.
        cu_seqlens_q (`torch.Tensor` of shape `(num_sequences + 1,)`, `torch.int32`):
            Borders of the sequences among the queries of the call.
        cu_seqlens_k (`torch.Tensor` of shape `(num_sequences + 1,)`, `torch.int32`):
            Borders of the sequences among the gathered keys.
        max_seqlen_q (`int`):
            Length of the longest query sequence.
        max_seqlen_k (`int`):
            Length of the longest key sequence.
        key_index (`torch.Tensor` of shape `(num_keys,)`, `torch.int32`, *optional*):
            Positions of the keys in the row; not given where they are the row as it is.
        window (`int`, *optional*):
            Size of the sliding window in tokens, the query itself included.
    """

    start: int
    end: int
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    key_index: torch.Tensor | None
    window: int | None

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Return the keys or values of the call, from those of the row, shape `(row_length, heads, head_dim)`."""
        return x if self.key_index is None else x.index_select(0, self.key_index)


def varlen_calls(mask: TreeMask) -> tuple[VarlenCall, ...]:
    """
    Return the calls that compute attention of a mask type; together they cover the row.

    The row of ten tokens in `key_ranges.py` takes one call with two sequences, one per run:

        causal     cu_seqlens_q 0 7 10    cu_seqlens_k 0 7 13    key_index 0 1 2 3 4 5 6  0 1 2 7 8 9
        window 3   cu_seqlens_q 0 7 10    cu_seqlens_k 0 7 12    key_index 0 1 2 3 4 5 6  1 2 7 8 9

    With chunks of 4, runs are cut at depth 4, and inside a chunk attention is plain causal:

        chunk 4    cu_seqlens_q 0 4 7 8 10    cu_seqlens_k 0 4 7 11 13    key_index 0 1 2 3  4 5 6  0 1 2 7  8 9

    Args:
        mask (`TreeMask`):
            Mask type of the model.

    Returns:
        `tuple[VarlenCall, ...]`: The calls: one, or as many as keep the gathered keys within `KEYS_PER_CALL` rows.

    Raises:
        `ValueError`: If the model's rule is not causal, a sliding window or a chunk, or if the tokens of an image see
            each other in both directions.
    """
    rule = mask.rule
    if rule is None:
        raise ValueError(
            f"The model's mask rule ({getattr(mask.mask_function, '__qualname__', mask.mask_function)}) is neither "
            "causal nor a sliding window nor a chunk, and flash kernels know no other. Load the model with "
            "attn_implementation='sdpa' or 'flex_attention'."
        )
    if rule.images:
        raise ValueError(
            "The tokens of an image see each other in both directions in this model, and flash varlen kernels mask "
            "all sequences of a call alike. Load the model with attn_implementation='sdpa' or 'flex_attention'."
        )
    plan = mask.tree.plan
    # Inside a chunk a token sees all ancestors of that chunk, so pieces of one chunk each are plain causal.
    chunk_size = rule.size if rule.kind is RuleKind.CHUNK else None
    pieces = Pieces.from_plan(plan, chunk_size, by_depth=True)
    ranges = key_ranges(plan, pieces, rule.first_depth(pieces.depth), before=pieces.end)
    key_index = concatenated_ranges(ranges.start, ranges.end - ranges.start)
    num_keys = np.bincount(ranges.piece, weights=ranges.end - ranges.start, minlength=len(pieces.start))
    return _calls(pieces, num_keys.astype(np.int64), key_index, rule, mask)


def _calls(pieces: Pieces, num_keys: Ints, key_index: Ints, rule: MaskRule, mask: TreeMask) -> tuple[VarlenCall, ...]:
    length = mask.tree.plan.length
    key_borders = np.concatenate([[0], np.cumsum(num_keys)])
    query_borders = np.append(pieces.start, length)
    groups = list(_grouped(key_borders, KEYS_PER_CALL * length))
    arrays: list[Ints] = []
    for first, last in groups:
        keys = key_index[key_borders[first] : key_borders[last]]
        is_row = len(keys) == length and bool((keys == np.arange(length)).all())
        arrays += [query_borders[first : last + 1] - query_borders[first]]
        arrays += [key_borders[first : last + 1] - key_borders[first], keys[:0] if is_row else keys]
    moved = _to_device(arrays, mask.tree.depth.device)
    return tuple(
        VarlenCall(
            start=int(query_borders[first]),
            end=int(query_borders[last]),
            cu_seqlens_q=moved[3 * i],
            cu_seqlens_k=moved[3 * i + 1],
            max_seqlen_q=int(np.diff(arrays[3 * i]).max()),
            max_seqlen_k=int(np.diff(arrays[3 * i + 1]).max()),
            key_index=moved[3 * i + 2] if len(moved[3 * i + 2]) else None,
            window=rule.size if rule.kind is RuleKind.WINDOW else None,
        )
        for i, (first, last) in enumerate(groups)
    )


def _grouped(borders: Ints, budget: int) -> Iterator[tuple[int, int]]:
    """
    Neighbouring pieces `[first, last)` with at most `budget` keys together, but at least one piece.

    Borders 0, 3, 5, 9 (pieces of 3, 2 and 4 keys) and a budget of 5 give `[0, 2)` and `[2, 3)`.
    """
    first = 0
    while first < len(borders) - 1:
        last = int(np.searchsorted(borders, borders[first] + budget, side="right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def _to_device(arrays: list[Ints], device: torch.device) -> tuple[torch.Tensor, ...]:
    """The arrays on a device, moved in one copy."""
    flat = torch.from_numpy(np.concatenate(arrays).astype(np.int32)).to(device, non_blocking=True)
    return torch.split(flat, [len(array) for array in arrays])
