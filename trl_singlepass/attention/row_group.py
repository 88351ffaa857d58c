"""
Ranks that share a row: each runs its part of the tokens, and layers that mix tokens see all of them.

Between such layers, rank `r` of `size` holds the `r`-th part of the row's tokens, with all heads. A layer that mixes
tokens exchanges parts for heads, so that each rank has the whole row with its share of the heads, and back (DeepSpeed
Ulysses, arXiv 2309.14509). With 2 ranks, 6 tokens and heads a to d, a rank has what stands in its line:

    rank 0     a b c d of tokens 0 1 2          a b of tokens 0 1 2 3 4 5
    rank 1     a b c d of tokens 3 4 5          c d of tokens 0 1 2 3 4 5

Every rank computes the loss of the whole row from outputs that are gathered. A gradient that arrives at gathered
tensors is therefore the same on all ranks, and its sum over the ranks is `size` times as large. That is right for
engines, which divide the sum of gradients by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Ranks that share rows."""

    process_group: dist.ProcessGroup
    size: int
    rank: int  # number of this rank among them

    def padded_length(self, length: int) -> int:
        """
        Return the length to which a row of `length` tokens is padded.

        Every rank has equally many tokens, and at least two: models take a single one for a step of generation.
        """
        return self.size * max(-(-length // self.size), 2)

    def part(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's part of a tensor that every rank has, along a dimension."""
        length = x.shape[dim] // self.size
        return x.narrow(dim, self.rank * length, length)

    def pad_and_part(self, x: Tensor, fill: int = 0) -> Tensor:
        """Return this rank's part of a tensor of shape `(1, row_length)` that every rank has, padded with `fill`."""
        return self.part(F.pad(x, (0, self.padded_length(x.shape[1]) - x.shape[1]), value=fill))

    def gather(self, x: Tensor) -> Tensor:
        """
        Return a per-token tensor for the whole row, on every rank. Its gradients add up over the ranks.

        Takes this rank's part, `(1, num_tokens, ...)`; returns `(1, size · num_tokens, ...)`.
        """

        def all_gather(x: Tensor) -> Tensor:
            parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
            dist.all_gather(parts, x.contiguous(), group=self.process_group)
            return torch.cat(parts, dim=1)

        def sum_of_parts(grad: Tensor) -> Tensor:
            return self._all_to_all(grad.reshape(self.size, -1, *grad.shape[2:])).sum(0)[None]

        return self._run(x, all_gather, sum_of_parts)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, on every rank. Its gradients add up over the ranks."""

        def all_reduce(x: Tensor) -> Tensor:
            total = x.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total, group=self.process_group)
            return total

        return self._run(x, all_reduce, all_reduce)

    def to_heads(self, x: Tensor, num_heads: int) -> Tensor:
        """
        Exchange a part of the row with all heads, `(1, num_tokens, heads, ...)`, for the whole row with a share of
        them.

        Fewer heads than `num_heads` (keys, groups of a state) serve several each. They are repeated until each rank's
        share serves that rank's heads: 2 keys for 8 heads stay 2 on 2 ranks and become 4 on 4. If the ranks cannot
        share the heads evenly, heads of zeros are added: 3 heads on 2 ranks become 4.
        """
        heads, tokens = x.shape[2], x.shape[1]
        repeated = lcm(heads, self.size) if num_heads % self.size == 0 else num_heads
        x = pad_dim(x.repeat_interleave(repeated // heads, dim=2) if repeated > heads else x, 2, -repeated % self.size)
        shares = x.reshape(tokens, self.size, -1, *x.shape[3:]).transpose(0, 1)
        return self._exchange(shares).flatten(0, 1)[None]

    def to_tokens(self, x: Tensor, num_heads: int) -> Tensor:
        """Exchange the whole row with a share of the heads for a part of the row with all `num_heads`."""
        parts = x.reshape(self.size, -1, *x.shape[2:])
        return self._exchange(parts).transpose(0, 1).flatten(1, 2)[None, :, :num_heads].contiguous()

    def share_of_heads(self, per_head: Tensor) -> Tensor:
        """Return this rank's share of a parameter of shape `(heads, ...)`, padded as heads are."""
        return self.part(pad_dim(per_head, 0, -per_head.shape[0] % self.size), dim=0)

    def _exchange(self, x: Tensor) -> Tensor:
        """Send entry `r` of a tensor of shape `(size, ...)` to rank `r`, and return what the ranks sent, in order."""
        return self._run(x, self._all_to_all, self._all_to_all)

    def _all_to_all(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=self.process_group)
        return received

    def _run(self, x: Tensor, run: Callable[[Tensor], Tensor], reverse: Callable[[Tensor], Tensor]) -> Tensor:
        return _Collective.apply(x, run, reverse)  # type: ignore[no-untyped-call, no-any-return]


def pad_dim(x: Tensor, dim: int, count: int) -> Tensor:
    """Return a tensor with zeros appended along a dimension."""
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, count)) if count else x


class _Collective(torch.autograd.Function):
    """A collective operation, and the one that computes its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], reverse: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.reverse = reverse
        return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.reverse(grads[0]), None, None
