"""Varlen calls of a row: which keys each run of queries is given, in plain integers made on the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from .key_ranges import Groups, Ints, KeyRanges, Pieces, concatenated_ranges, group_pieces, key_ranges
from .kv_cache import LayerSlots
from .mask_rules import RuleKind
from .tree_mask import TreeMask


@dataclass(frozen=True, slots=True, eq=False)
class VarlenCall:
    """
    One call of a varlen kernel: sequences of queries that lie together in the row, each against some keys.

    If causal, queries are aligned with the end of their keys ("bottom-right"), as in flash kernels: the last query
    sees the last key. A path is contiguous in depth, so the kernel's sliding window is a window by depth.
    """

    start: int  # position of the first query in the row
    end: int  # just past the last query
    cu_seqlens_q: Tensor  # (num_sequences + 1,), int32: borders of the sequences among the queries of the call
    cu_seqlens_k: Tensor  # the same among the keys of the call
    max_seqlen_q: int  # length of the longest query sequence
    max_seqlen_k: int  # length of the longest key sequence
    num_keys: int  # that its pass gathers for it: first those of `path`, then those of `shared`
    window: int | None  # size of the sliding window in tokens, the query itself included
    is_causal: bool = True  # if not, queries see all of their sequence
    without_keys: Tensor | None = None  # (num_queries, 1, 1, 1), bool: queries whose sequence has no keys, if any


@dataclass(frozen=True, slots=True, eq=False)
class VarlenPass:
    """Calls whose keys are gathered together."""

    # (num_keys,), int32: positions of the keys in the row and, from the row's length on, among the slots that the plan
    # fetches. `None` where they are the row as it is.
    key_index: Tensor | None
    path: VarlenCall | None  # runs against the ends of their paths, or against the whole paths if nothing is shared
    # Groups of runs against the beginning that all of their paths share. Each query is repeated for all query heads
    # that read one key-value head, so that a call has one query head per key-value head.
    shared: VarlenCall | None


@dataclass(frozen=True, slots=True, eq=False)
class VarlenPlan:
    """Calls that together compute attention of a row."""

    # The calls of `path` cover the row in order, and those of `shared` all of it but what is `alone`.
    passes: tuple[VarlenPass, ...]
    # Ranges of queries at the ends of the row that share no keys with others, such as the first run of a tree.
    alone: tuple[tuple[int, int], ...]
    # First slot of the cache that the row attends to, and the one just past the last.
    slots: tuple[int, int] | None = None
    # (num_cached,), int32: positions of tokens that later rows attend to; `None` where they lie together.
    cached_for_later: Tensor | None = None


# Most keys that one call gathers, as a multiple of the row's tokens: bounds memory where many branches share a long
# history. Keys that a group shares cost less: their gradients are not expanded to all query heads.
KEYS_PER_CALL = 4
SHARED_KEYS_PER_CALL = 8


def varlen_plan(mask: TreeMask, heads_per_key: int = 1, slots: LayerSlots | None = None) -> VarlenPlan:
    """
    Return the calls that compute attention of a mask type.

    The row of ten tokens in `key_ranges.py` takes one call with two sequences, one per run:

        causal     cu_seqlens_q 0 7 10    cu_seqlens_k 0 7 13    key_index 0 1 2 3 4 5 6  0 1 2 7 8 9
        window 3   cu_seqlens_q 0 7 10    cu_seqlens_k 0 7 12    key_index 0 1 2 3 4 5 6  1 2 7 8 9

    With chunks of 4, runs are cut at depth 4, and inside a chunk attention is plain causal:

        chunk 4    cu_seqlens_q 0 4 7 8 10    cu_seqlens_k 0 4 7 11 13    key_index 0 1 2 3  4 5 6  0 1 2 7  8 9

    Where whole paths have more keys than one call takes, the beginnings that neighbouring runs share are gathered
    once, for a second call. The row above then takes, for its second run, 0 1 2 there and 7 8 9 here.

    There are as many calls as keep the gathered keys within `KEYS_PER_CALL` rows. `heads_per_key` counts query heads
    per key-value head; `slots` are those of the layers, where ancestors are outside the row. Raises `ValueError` for
    rules other than causal, window or chunk, and for images whose tokens see each other.
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
    length = mask.tree.plan.length
    paths, shared = _sequences(mask, heads_per_key)
    shared_calls = [] if shared is None else shared.split(SHARED_KEYS_PER_CALL * length)
    calls = list(zip_longest(paths.split(KEYS_PER_CALL * length), shared_calls))
    indices = [np.concatenate([x.key_index for x in call if x is not None]) for call in calls]
    indices, fetched = _with_slots(indices, slots, length)
    if len(indices) == 1 and np.array_equal(indices[0], np.arange(length)):
        indices = [indices[0][:0]]  # the keys are the row as it is
    arrays = [_cached_for_later(slots)]
    for (path, group), index in zip(calls, indices, strict=True):
        arrays.append(index)
        arrays += [] if path is None else path.arrays(1)
        arrays += [] if group is None else group.arrays(heads_per_key)
    moved = iter(_to_device(arrays, mask.tree.depth.device))
    cached_for_later = next(moved)
    alone = [(0, length)] if shared is None else [(0, int(shared.start[0])), (int(shared.start[-1]), length)]
    window = rule.size if rule.kind is RuleKind.WINDOW else None
    return VarlenPlan(
        passes=tuple(_make_pass(path, group, heads_per_key, window, moved) for path, group in calls),
        alone=tuple((first, last) for first, last in alone if first < last),
        slots=fetched,
        cached_for_later=cached_for_later if len(cached_for_later) else None,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Sequences:
    """Sequences of a row: the first query of each, and just past the last one; borders and positions of keys."""

    start: Ints
    key_borders: Ints
    key_index: Ints

    def split(self, budget: int) -> Iterator[_Sequences]:
        """
        Yield neighbouring sequences with at most `budget` keys together, but at least one sequence.

        Borders 0, 3, 5, 9 (sequences of 3, 2 and 4 keys) and a budget of 5 give the first two, then the third.
        """
        borders, first = self.key_borders, 0
        while first < len(borders) - 1:
            last = max(int(np.searchsorted(borders, borders[first] + budget, side="right")) - 1, first + 1)
            keys = self.key_index[borders[first] : borders[last]]
            yield _Sequences(self.start[first : last + 1], borders[first : last + 1] - borders[first], keys)
            first = last

    def arrays(self, heads_per_key: int) -> tuple[Ints, Ints, Ints]:
        """
        Return the borders of queries, repeated for each of so many heads, and those of keys; and for each query,
        whether it has no keys, nothing where all have some.
        """
        is_empty = np.diff(self.key_borders) == 0
        without_keys = np.repeat(is_empty, np.diff(self.start)) if is_empty.any() else is_empty[:0]
        return (self.start - self.start[0]) * heads_per_key, self.key_borders, without_keys.astype(np.int64)


def _sequences(mask: TreeMask, heads_per_key: int) -> tuple[_Sequences, _Sequences | None]:
    """Paths of all runs, and beginnings shared by groups of them where whole paths have too many keys."""
    rule, plan = mask.rule, mask.tree.plan
    assert rule is not None, "checked before"
    # Inside a chunk a token sees all ancestors of that chunk, so pieces of one chunk each are plain causal.
    pieces = Pieces.from_plan(plan, rule.size if rule.kind is RuleKind.CHUNK else None, by_depth=True)
    start, first_depth = np.append(pieces.start, plan.length), rule.first_depth(pieces.depth)
    ranges = key_ranges(plan, pieces, first_depth, before=pieces.end)
    num_keys = np.bincount(ranges.piece, ranges.end - ranges.start, len(pieces.start)).astype(np.int64)
    shared = None
    if rule.kind is not RuleKind.WINDOW and num_keys.sum() > KEYS_PER_CALL * plan.length:
        groups = _groups_of_one_call(pieces, ranges, num_keys, heads_per_key, plan.length)
        # The keys of a piece are contiguous in depth: without the shared ones, they start that much deeper.
        own = key_ranges(plan, pieces, first_depth + groups.of_pieces(len(pieces.start)), before=pieces.end)
        of_first = np.isin(ranges.piece, groups.first)
        index = concatenated_ranges(ranges.start[of_first], (ranges.end - ranges.start)[of_first])
        count = num_keys[groups.first]
        index = index[concatenated_ranges(np.cumsum(count) - count, groups.num_shared)]
        shared = _with_keys(_Sequences(start[np.append(groups.first, -1)], _borders(groups.num_shared), index))
        ranges, num_keys = own, num_keys - groups.of_pieces(len(pieces.start))
    index = concatenated_ranges(ranges.start, ranges.end - ranges.start)
    return _Sequences(start, _borders(num_keys), index), shared


def _with_keys(shared: _Sequences) -> _Sequences | None:
    """Leave out sequences without keys at both ends: the first run of a tree, often half of it, has none."""
    (kept,) = np.nonzero(np.diff(shared.key_borders))
    if not len(kept):
        return None
    borders = slice(kept[0], kept[-1] + 2)
    return _Sequences(shared.start[borders], shared.key_borders[borders], shared.key_index)


def _groups_of_one_call(pieces: Pieces, ranges: KeyRanges, num_keys: Ints, heads_per_key: int, length: int) -> Groups:
    """Groups whose shared keys fit into one call, if possible: larger groups share fewer keys."""
    cost = 1 / heads_per_key  # in memory
    groups = group_pieces(pieces, ranges, num_keys, cost)
    while groups.num_shared.sum() > SHARED_KEYS_PER_CALL * length and cost < 1:
        cost *= 1.5
        groups = group_pieces(pieces, ranges, num_keys, cost)
    return groups


def _borders(count: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(count)])


def _with_slots(
    indices: list[Ints], slots: LayerSlots | None, length: int
) -> tuple[list[Ints], tuple[int, int] | None]:
    """
    Return key positions with slots counted from the first that the row attends to, and the range of these slots.

    Slots 1 and 2 of a layer are the positions 21 and 22 of a row of 20 tokens. A row that attends to no others fetches
    the slots 1 and 2, which become the positions 20 and 21.
    """
    if slots is None:
        return indices, None
    located = [slots.locate(index, length) for index in indices]
    used = np.concatenate([index[index >= length] for index in located]) - length
    if not len(used):
        return indices, None
    first, last = int(used.min()), int(used.max())
    return [np.where(index < length, index, index - first) for index in located], (first, last + 1)


def _cached_for_later(slots: LayerSlots | None) -> Ints:
    """Positions of tokens that later rows attend to; nothing where a slice says it."""
    if slots is None or len(slots.cached_for_later) < 2:
        return np.empty(0, np.int64)
    return np.concatenate([np.arange(first, last) for first, last, _ in slots.cached_for_later])


def _make_pass(
    path: _Sequences | None, group: _Sequences | None, heads_per_key: int, window: int | None, moved: Iterator[Tensor]
) -> VarlenPass:
    """Return a pass from its sequences and from the next tensors on the device."""
    index = next(moved)

    def make_call(sequences: _Sequences, heads: int, window: int | None, is_causal: bool) -> VarlenCall:
        queries, keys, without_keys = next(moved), next(moved), next(moved)
        return VarlenCall(
            start=int(sequences.start[0]),
            end=int(sequences.start[-1]),
            cu_seqlens_q=queries,
            cu_seqlens_k=keys,
            max_seqlen_q=int(np.diff(sequences.start).max()) * heads,
            max_seqlen_k=int(np.diff(sequences.key_borders).max()),
            num_keys=len(sequences.key_index),
            window=window,
            is_causal=is_causal,
            without_keys=without_keys.bool().view(-1, 1, 1, 1) if len(without_keys) else None,
        )

    own = None if path is None else make_call(path, 1, window, is_causal=True)
    shared = None if group is None else make_call(group, heads_per_key, None, is_causal=False)
    return VarlenPass(index if len(index) else None, own, shared)


def _to_device(arrays: list[Ints], device: torch.device) -> tuple[Tensor, ...]:
    """The arrays on a device, moved in one copy."""
    flat = torch.from_numpy(np.concatenate(arrays).astype(np.int32)).to(device, non_blocking=True)
    return torch.split(flat, [len(array) for array in arrays])
