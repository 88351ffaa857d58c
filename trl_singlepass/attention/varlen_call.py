"""Calls of a varlen kernel that together compute attention of a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class VarlenCall:
    """
    One call of a varlen kernel: sequences of queries that lie together in the row, each against some keys.

    If causal, queries are aligned with the end of their keys ("bottom-right"), as in flash kernels: the last query
    sees the last key. A path is contiguous in depth, so the kernel's sliding window is a window by depth.
    """

    start: int  # position of the first query in the row
    end: int  # just past the last query
    cu_seqlens_q: torch.Tensor  # (num_sequences + 1,), int32: borders of the sequences among the queries of the call
    cu_seqlens_k: torch.Tensor  # the same among the keys of the call
    max_seqlen_q: int  # length of the longest query sequence
    max_seqlen_k: int  # length of the longest key sequence
    keys: slice  # those of the call among those that its pass gathers
    window: int | None  # size of the sliding window in tokens, the query itself included
    is_causal: bool = True  # if not, queries see all of their sequence


@dataclass(frozen=True, slots=True, eq=False)
class VarlenPass:
    """Calls whose keys are gathered together."""

    # (num_keys,), int32: positions of the keys in the row and, from the row's length on, among the slots that the plan
    # fetches. `None` where they are the row as it is.
    key_index: torch.Tensor | None
    path: VarlenCall | None  # runs against the ends of their paths, or against the whole paths if nothing is shared
    # Groups of runs against the beginning that all of their paths share. Each query is repeated for all query heads
    # that read one key-value head, so that a call has one query head per key-value head.
    shared: VarlenCall | None


@dataclass(frozen=True, slots=True, eq=False)
class VarlenPlan:
    """Calls that together compute attention of a row."""

    # The calls of `path` cover the row in order, and so do those of `shared`, if there are any.
    passes: tuple[VarlenPass, ...]
    without_shared: torch.Tensor | None = None  # (row_length,), bool: queries that have no key in any call of `shared`
    # First slot of the cache that the row attends to, and the one just past the last.
    slots: tuple[int, int] | None = None
    # (num_handed_on,), int32: positions of tokens that later rows attend to; `None` where they lie together.
    handed_on: torch.Tensor | None = None

    @property
    def gathers_nothing(self) -> bool:
        """Whether the keys of the only call are the row as it is."""
        return self.passes[0].key_index is None
