"""Attention of one block of queries to one block of keys, with the log-sum-exp that lets blocks be merged exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch


aten = torch.ops.aten


class BlockKernel(ABC):
    """
    Attention between blocks of one row, forward and backward.

    Shapes: query `(1, heads, num_queries, head_dim)`, key and value `(1, kv_heads, num_keys, head_dim)`, mask
    `(num_queries, num_keys)`, log-sum-exp `(1, heads, num_queries)`. In `backward`, `out` and `lse` are the **merged**
    output and log-sum-exp of the queries over all their blocks: with them each block's gradients are exact on their
    own, and the gradients of a query's blocks add up (as in ring attention).
    """

    query_block: ClassVar[int | None] = None
    """Largest number of queries per call that keeps memory linear in the row, `None` for no limit."""

    @abstractmethod
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output of the block alone, and the log-sum-exp of its scores."""

    @abstractmethod
    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        mask: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the block's share of the gradients of its queries, keys and values."""


class CpuFlash(BlockKernel):
    """PyTorch's flash attention for CPU: linear memory, grouped heads, float64 included."""

    def forward(self, q: Any, k: Any, v: Any, causal: bool, mask: Any, scale: float) -> tuple[Any, Any]:
        """Return output and log-sum-exp."""
        bias = _additive(mask, q.dtype)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        return out, lse

    def backward(
        self, grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, causal: bool, mask: Any, scale: float
    ) -> tuple[Any, Any, Any]:
        """Return the gradients of queries, keys and values."""
        bias = _additive(mask, q.dtype)
        grads: tuple[Any, Any, Any] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse.contiguous(), 0.0, causal, attn_mask=bias, scale=scale
        )
        return grads


class CudaFlash(BlockKernel):
    """PyTorch's flash attention for CUDA (half precision, head size up to 256); takes no mask."""

    def forward(self, q: Any, k: Any, v: Any, causal: bool, mask: Any, scale: float) -> tuple[Any, Any]:
        """Return output and log-sum-exp."""
        assert mask is None, "the flash kernel takes no mask"
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
        return out, lse

    def backward(
        self, grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, causal: bool, mask: Any, scale: float
    ) -> tuple[Any, Any, Any]:
        """Return the gradients of queries, keys and values."""
        unused = torch.empty(0, dtype=torch.int64, device=q.device)  # random state and borders: no dropout, no varlen
        grads: tuple[Any, Any, Any] = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused,
            scale=scale,
        )  # fmt: skip
        return grads


class BlockMath(BlockKernel):
    """
    The formulas themselves in plain PyTorch: any device and dtype, masks, softcap.

    With `c = softcap · tanh(s / softcap)`, `p = exp(c - lse)` and `delta = rowsum(grad · out)`:
    `dv = pᵀ grad`, `dc = p (grad vᵀ - delta)`, `ds = dc (1 - (c / softcap)²)`, `dq = ds k`, `dk = dsᵀ q`.

    Source: FlashAttention-2, arXiv 2307.08691, algorithm 2; softcap by the chain rule.
    """

    query_block: ClassVar[int | None] = 256

    def __init__(self, softcap: float | None = None) -> None:
        self.softcap = softcap

    def forward(self, q: Any, k: Any, v: Any, causal: bool, mask: Any, scale: float) -> tuple[Any, Any]:
        """Return output and log-sum-exp."""
        scores = self._scores(q, k, causal, mask, scale)
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp() @ _grouped(v, q).to(scores.dtype)
        return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)

    def backward(
        self, grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, causal: bool, mask: Any, scale: float
    ) -> tuple[Any, Any, Any]:
        """Return the gradients of queries, keys and values."""
        scores = self._scores(q, k, causal, mask, scale)
        dtype, kv_heads = scores.dtype, k.shape[1]
        weights = (scores - _split_heads(lse, kv_heads)[..., None]).exp()
        grad_, q_ = _split_heads(grad, kv_heads).to(dtype), _split_heads(q, kv_heads).to(dtype)
        delta = (grad_ * _split_heads(out, kv_heads).to(dtype)).sum(-1, keepdim=True)
        grad_scores = weights * (grad_ @ _grouped(v, q).to(dtype).transpose(-1, -2) - delta)
        if self.softcap is not None:
            grad_scores = grad_scores * (1 - (scores.nan_to_num(neginf=0.0) / self.softcap) ** 2)
        grad_scores = grad_scores * scale
        grad_q = (grad_scores @ _grouped(k, q).to(dtype)).flatten(1, 2)
        grad_k = (grad_scores.transpose(-1, -2) @ q_).sum(2)
        grad_v = (weights.transpose(-1, -2) @ grad_).sum(2)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

    def _scores(self, q: Any, k: Any, causal: bool, mask: Any, scale: float) -> torch.Tensor:
        """Scores of shape `(1, kv_heads, groups, num_queries, num_keys)`, -inf where masked."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = _split_heads(q, k.shape[1]).to(dtype) @ _grouped(k, q).to(dtype).transpose(-1, -2) * scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def kernel_for(query: torch.Tensor, *, softcap: float | None, masked: bool) -> BlockKernel:
    """
    Return the fastest kernel of PyTorch that computes this attention.

    Args:
        query (`torch.Tensor` of shape `(1, heads, row_length, head_dim)`):
            Queries.
        softcap (`float`, *optional*):
            Softcap of the scores.
        masked (`bool`):
            Whether blocks carry a mask.
    """
    if softcap is not None:
        return BlockMath(softcap)
    if query.device.type == "cpu":
        return CpuFlash()
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cuda" and is_half and query.shape[-1] <= 256 and not masked:
        return CudaFlash()
    return BlockMath()


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)[None, None]


def _split_heads(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Split the heads, dimension 1, in key-value heads and groups."""
    return x.view(x.shape[0], kv_heads, -1, *x.shape[2:])


def _grouped(kv: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Insert the dimension of the groups of query heads."""
    return kv[:, :, None]
