"""Tree attention on varlen flash kernels: one call for all branches, keys gathered along each branch's path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .inputs import AttentionInputs, Gradients
from .sinks import add_sinks_, sink_gradient
from .tree_mask import TreeMask
from .varlen_plan import VarlenCall, varlen_calls


@dataclass(frozen=True, slots=True, eq=False)
class VarlenInputs:
    """
    One call of a varlen kernel.

    Args:
        query (`torch.Tensor` of shape `(num_queries, heads, head_dim)`):
            Queries.
        key (`torch.Tensor` of shape `(num_keys, kv_heads, head_dim)`):
            Keys.
        value (`torch.Tensor` of shape `(num_keys, kv_heads, head_dim)`):
            Values.
        call (`VarlenCall`):
            Borders of the sequences, and the window.
        scale (`float`):
            Factor of the scores.
        softcap (`float`):
            Softcap of the scores, 0 for none.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    call: VarlenCall
    scale: float
    softcap: float


class VarlenKernel(ABC):
    """Flash attention over sequences of different lengths, causal and aligned at the end of the keys."""

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    """Dtypes that the kernel takes."""
    max_head_dim: ClassVar[int] = 256
    """Largest size of a head."""
    has_softcap: ClassVar[bool] = True
    """Whether the kernel has a softcap."""

    @abstractmethod
    def forward(self, x: VarlenInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output, `(num_queries, heads, head_dim)`, and the log-sum-exp, `(heads, num_queries)`."""

    @abstractmethod
    def backward(
        self, grad: torch.Tensor, x: VarlenInputs, out: torch.Tensor, lse: torch.Tensor, *, deterministic: bool
    ) -> Gradients:
        """Return the gradients, from the gradient of the output and from what `forward` returned."""


def varlen_tree_attention(
    inputs: AttentionInputs, mask: TreeMask, kernel: VarlenKernel, deterministic: bool = False
) -> torch.Tensor:
    """
    Return attention of a row of trees by a varlen flash kernel.

    Args:
        inputs (`AttentionInputs`):
            Tensors of the layer.
        mask (`TreeMask`):
            Mask of the layer.
        kernel (`VarlenKernel`):
            Kernel.
        deterministic (`bool`, *optional*, defaults to `False`):
            Whether gradients are added up in a fixed order, which is slower.

    Returns:
        `torch.Tensor` of shape `(1, row_length, heads, value_dim)`: The output.
    """
    padded = inputs.with_one_head_dim(8)  # a multiple of 8 is what flash kernels want
    tokens_first = (x.transpose(1, 2).squeeze(0) for x in (padded.query, padded.key, padded.value))
    run = _Run(mask.build_once(varlen_calls), kernel, inputs.scale, inputs.softcap or 0.0, deterministic)
    out: torch.Tensor = VarlenAttention.apply(*tokens_first, inputs.sinks, run)  # type: ignore[no-untyped-call]
    return out[..., : inputs.value.shape[-1]].unsqueeze(0)


@dataclass(frozen=True, slots=True)
class _Run:
    """The kernel calls that together cover a row, and their options."""

    calls: tuple[VarlenCall, ...]
    kernel: VarlenKernel
    scale: float
    softcap: float
    deterministic: bool

    def cut(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: VarlenCall) -> VarlenInputs:
        """Return the inputs of one call."""
        here = query[call.start : call.end]
        return VarlenInputs(here, call.keys(key), call.keys(value), call, self.scale, self.softcap)


class VarlenAttention(torch.autograd.Function):
    """
    Attention of a row of trees by a varlen kernel.

    Shapes: query and output `(row_length, heads, head_dim)`, key and value `(row_length, kv_heads, head_dim)`, sinks
    `(heads,)`.

    Keys and values are gathered along the paths for the call only, and gathered again for backward instead of kept.
    Sinks enter after the kernel: backward takes the output and log-sum-exp **with** the sink, which makes every
    gradient of the kernel exact (as in ring attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, run: _Run
    ) -> torch.Tensor:
        """Return the output."""
        parts = [run.kernel.forward(run.cut(query, key, value, call)) for call in run.calls]
        if len(parts) == 1:
            out, lse = parts[0]
        else:
            out, lse = torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)
        if sinks is not None:
            lse = add_sinks_(out.transpose(0, 1), lse, sinks)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.run = run
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of `query`, `key`, `value` and `sinks`, and `None` for the rest."""
        query, key, value, sinks, out, lse = ctx.saved_tensors
        run: _Run = ctx.run
        grad = grads[0].contiguous()
        grad_query: list[torch.Tensor] = []
        grad_key, grad_value = _PathSum(key, run.deterministic), _PathSum(value, run.deterministic)
        for call in run.calls:
            here = slice(call.start, call.end)
            inputs = run.cut(query, key, value, call)
            dq, dk, dv = run.kernel.backward(
                grad[here], inputs, out[here], lse[:, here].contiguous(), deterministic=run.deterministic
            )
            grad_query.append(dq)
            grad_key.add(dk, call.key_index)
            grad_value.add(dv, call.key_index)
        grad_sinks = None
        if sinks is not None:
            grad_sinks = sink_gradient(grad.transpose(0, 1), out.transpose(0, 1), lse, sinks)
        joined = grad_query[0] if len(grad_query) == 1 else torch.cat(grad_query)
        return joined, grad_key.total, grad_value.total, grad_sinks, None


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
