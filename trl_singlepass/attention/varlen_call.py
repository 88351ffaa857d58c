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

    Args:
        start (`int`):
            Position of the first query in the row.
        end (`int`):
            Position just past the last query.
        cu_seqlens_q (`torch.Tensor` of shape `(num_sequences + 1,)`, `torch.int32`):
            Borders of the sequences among the queries of the call.
        cu_seqlens_k (`torch.Tensor` of shape `(num_sequences + 1,)`, `torch.int32`):
            Borders of the sequences among the keys of the call.
        max_seqlen_q (`int`):
            Length of the longest query sequence.
        max_seqlen_k (`int`):
            Length of the longest key sequence.
        keys (`slice`):
            Keys of the call among those that its pass gathers.
        window (`int`, *optional*):
            Size of the sliding window in tokens, the query itself included.
        is_causal (`bool`, *optional*, defaults to `True`):
            Whether queries see keys up to their own only; if not, they see all of their sequence.
    """

    start: int
    end: int
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    keys: slice
    window: int | None
    is_causal: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class VarlenPass:
    """
    Calls whose keys are gathered together.

    Args:
        key_index (`torch.Tensor` of shape `(num_keys,)`, `torch.int32`, *optional*):
            Positions of the keys: below the length of the row in the row, from there on among the slots that the plan
            fetches. Not given where they are the row as it is.
        path (`VarlenCall`, *optional*):
            Runs against the ends of their paths, or against the whole paths if nothing is shared.
        shared (`VarlenCall`, *optional*):
            Groups of runs against the beginning that all of their paths share. Each query is repeated for all query
            heads that read one key-value head, so that a call has one query head per key-value head.
    """

    key_index: torch.Tensor | None
    path: VarlenCall | None
    shared: VarlenCall | None


@dataclass(frozen=True, slots=True, eq=False)
class VarlenPlan:
    """
    Calls that together compute attention of a row.

    Args:
        passes (`tuple[VarlenPass, ...]`):
            The calls. Those of `path` cover the row in order, and so do those of `shared`, if there are any.
        without_shared (`torch.Tensor` of shape `(row_length,)`, `torch.bool`, *optional*):
            Queries that have no key in any call of `shared`.
        slots (`tuple[int, int]`, *optional*):
            First slot of the cache that the row attends to, and the one just past the last.
        handed_on (`torch.Tensor` of shape `(num_handed_on,)`, `torch.int32`, *optional*):
            Positions of tokens that later rows attend to; not given where they lie together.
    """

    passes: tuple[VarlenPass, ...]
    without_shared: torch.Tensor | None = None
    slots: tuple[int, int] | None = None
    handed_on: torch.Tensor | None = None

    @property
    def gathers_nothing(self) -> bool:
        """Whether the keys of the only call are the row as it is."""
        return self.passes[0].key_index is None
