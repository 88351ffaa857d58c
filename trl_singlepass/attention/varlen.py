"""Tree attention on varlen flash kernels: one call for all branches, keys gathered along each branch's path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from .blocks import sink_gradient
from .varlen_plan import VarlenCall


class VarlenKernel(ABC):
    """
    Flash attention over sequences of different lengths, causal and aligned at the end of the keys.

    Shapes: query and out `(num_queries, heads, head_dim)`, key and value `(num_keys, kv_heads, head_dim)`, log-sum-exp
    `(heads, num_queries)`.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    """Dtypes that the kernel takes."""
    has_softcap: ClassVar[bool] = True
    """Whether the kernel has a softcap."""

    @abstractmethod
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: VarlenCall, scale: float, softcap: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output and log-sum-exp; `softcap` is 0 where there is none."""

    @abstractmethod
    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: VarlenCall,
        scale: float,
        softcap: float,
        deterministic: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of queries, keys and values."""


class VarlenAttention(torch.autograd.Function):
    """
    Attention of a row of trees by a varlen kernel.

    Keys and values are gathered along the paths for the call only, and gathered again for backward instead of kept.
    Sinks enter after the kernel: backward takes the output and log-sum-exp **with** the sink, which makes every
    gradient of the kernel exact (as in ring attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        calls: tuple[VarlenCall, ...],
        kernel: VarlenKernel,
        scale: float,
        softcap: float,
        deterministic: bool,
    ) -> torch.Tensor:
        """
        Compute the output.

        Args:
            ctx (`Any`):
                Autograd context.
            query (`torch.Tensor` of shape `(row_length, heads, head_dim)`):
                Queries.
            key (`torch.Tensor` of shape `(row_length, kv_heads, head_dim)`):
                Keys.
            value (`torch.Tensor` of shape `(row_length, kv_heads, head_dim)`):
                Values.
            sinks (`torch.Tensor` of shape `(heads,)`, *optional*):
                Logit per head of a key without value (gpt-oss).
            calls (`tuple[VarlenCall, ...]`):
                Calls that cover the row.
            kernel (`VarlenKernel`):
                Code that computes a call.
            scale (`float`):
                Factor of the scores.
            softcap (`float`):
                Softcap of the scores, 0 for none.
            deterministic (`bool`):
                Whether gradients are added up in a fixed order.

        Returns:
            `torch.Tensor` of shape `(row_length, heads, head_dim)`: The output.
        """
        outs, lses = zip(
            *[kernel.forward(query[c.start : c.end], c.keys(key), c.keys(value), c, scale, softcap) for c in calls],
            strict=True,
        )
        out, lse = (outs[0], lses[0]) if len(calls) == 1 else (torch.cat(outs), torch.cat(lses, dim=1))
        if sinks is not None:
            merged = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
            out = out * (lse - merged).exp().T[..., None].to(out.dtype)
            lse = merged
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.calls, ctx.kernel, ctx.options = calls, kernel, (scale, softcap, deterministic)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """
        Compute the gradients.

        Args:
            ctx (`Any`):
                Autograd context.
            *grads (`torch.Tensor` of shape `(row_length, heads, head_dim)`):
                Gradient of the output.

        Returns:
            `tuple`: Gradients of `query`, `key`, `value` and `sinks`; `None` for the rest.
        """
        query, key, value, sinks, out, lse = ctx.saved_tensors
        grad, deterministic = grads[0].contiguous(), ctx.options[-1]
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_key, grad_value = _PathSum(key, deterministic), _PathSum(value, deterministic)
        for c in ctx.calls:
            here = slice(c.start, c.end)
            dq, dk, dv = ctx.kernel.backward(
                grad[here], query[here], c.keys(key), c.keys(value), out[here], lse[:, here].contiguous(), c,
                *ctx.options,
            )  # fmt: skip
            grad_query[here] = dq
            grad_key.add(dk, c.key_index)
            grad_value.add(dv, c.key_index)
        grad_sinks = None
        if sinks is not None:
            grad_sinks = sink_gradient(grad.transpose(0, 1)[None], out.transpose(0, 1)[None], lse[None], sinks)
        return grad_query, grad_key.total, grad_value.total, grad_sinks, None, None, None, None, None


class _PathSum:
    """Sum of gathered gradients in the row: history gets one from every branch, added up in float32 at least."""

    def __init__(self, like: torch.Tensor, deterministic: bool) -> None:
        self.like, self.deterministic = like, deterministic
        self.sum: torch.Tensor | None = None

    def add(self, part: torch.Tensor, index: torch.Tensor | None) -> None:
        if index is None:  # the keys of the only call are the row: nothing to add up
            self.sum = part
            return
        if self.sum is None:
            dtype = torch.promote_types(part.dtype, torch.float32)
            self.sum = torch.zeros(self.like.shape, dtype=dtype, device=part.device)
        if self.deterministic:  # sorts the index; `index_add_` adds in whatever order threads come
            self.sum.index_put_((index.long(),), part.to(self.sum.dtype), accumulate=True)
        else:
            self.sum.index_add_(0, index, part.to(self.sum.dtype))

    @property
    def total(self) -> torch.Tensor:
        assert self.sum is not None, "a row has at least one call"
        return self.sum.to(self.like.dtype)
