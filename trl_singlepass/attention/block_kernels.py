"""Attention of one block of queries to one block of keys, with the log-sum-exp that lets blocks be merged exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .interface import Gradients
from .kernel_choice import TorchKernel


aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class BlockInputs:
    """One block of queries and keys of a row."""

    query: Tensor  # (1, heads, num_queries, head_dim)
    key: Tensor  # (1, kv_heads, num_keys, head_dim)
    value: Tensor  # like `key`
    is_causal: bool  # query `i` sees keys up to `i` only
    mask: Tensor | None  # (num_queries, num_keys), bool: `True` where the query attends
    scale: float  # factor of the scores


class BlockKernel(ABC):
    """Attention of one block, forward and backward."""

    query_block: ClassVar[int | None] = None
    """Largest number of queries per call that keeps memory linear in the row, `None` for no limit."""
    head_dim_multiple: ClassVar[int] = 1
    """Head sizes are padded to a multiple of this number."""

    @abstractmethod
    def forward(self, block: BlockInputs) -> tuple[Tensor, Tensor]:
        """Return the output of the block alone, and the log-sum-exp of its scores, `(1, heads, num_queries)`."""

    @abstractmethod
    def backward(self, grad: Tensor, block: BlockInputs, out: Tensor, lse: Tensor) -> Gradients:
        """
        Return the block's share of the gradients, from the gradient of the merged output.

        Output and log-sum-exp, `(1, heads, num_queries, head_dim)` and `(1, heads, num_queries)`, are those of the
        queries **merged** over all their blocks. With them, each block's gradients are exact on their own, and those
        of a query's blocks add up (as in ring attention).
        """


class CpuFlash(BlockKernel):
    """PyTorch's flash attention for CPU: linear memory, grouped heads, float64 included."""

    def forward(self, block: BlockInputs) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp."""
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            block.query, block.key, block.value, 0.0, block.is_causal, attn_mask=_bias(block), scale=block.scale
        )
        return out, lse

    def backward(self, grad: Tensor, block: BlockInputs, out: Tensor, lse: Tensor) -> Gradients:
        """Return the gradients of queries, keys and values."""
        grads: Gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, block.query, block.key, block.value, out, lse.contiguous(), 0.0, block.is_causal,
            attn_mask=_bias(block), scale=block.scale,
        )  # fmt: skip
        return grads


class CudaFlash(BlockKernel):
    """PyTorch's flash attention for CUDA (half precision, head size up to 256); takes no mask."""

    head_dim_multiple: ClassVar[int] = 8

    def forward(self, block: BlockInputs) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp."""
        assert block.mask is None, "the flash kernel takes no mask"
        out, lse = aten._scaled_dot_product_flash_attention(
            block.query, block.key, block.value, 0.0, block.is_causal, False, scale=block.scale
        )[:2]
        return out, lse

    def backward(self, grad: Tensor, block: BlockInputs, out: Tensor, lse: Tensor) -> Gradients:
        """Return the gradients of queries, keys and values."""
        q, k, v = block.query, block.key, block.value
        unused = torch.empty(0, dtype=torch.int64, device=q.device)  # random state and borders: no dropout, no varlen
        grads: Gradients = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, block.is_causal, unused,
            unused, scale=block.scale,
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

    def forward(self, block: BlockInputs) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp."""
        scores = self._scores(block)
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp() @ block.value[:, :, None].to(scores.dtype)
        return out.flatten(1, 2).to(block.query.dtype), lse.flatten(1, 2)

    def backward(self, grad: Tensor, block: BlockInputs, out: Tensor, lse: Tensor) -> Gradients:
        """Return the gradients of queries, keys and values."""
        scores = self._scores(block)
        dtype, kv_heads = scores.dtype, block.key.shape[1]
        grad_, out_, q, lse_ = (_in_groups(x, kv_heads).to(dtype) for x in (grad, out, block.query, lse))
        k, v = (x[:, :, None].to(dtype) for x in (block.key, block.value))
        weights = (scores - lse_[..., None]).exp()
        delta = (grad_ * out_).sum(-1, keepdim=True)
        grad_scores = weights * (grad_ @ v.transpose(-1, -2) - delta)
        if self.softcap is not None:
            grad_scores = grad_scores * (1 - (scores.nan_to_num(neginf=0.0) / self.softcap) ** 2)
        grad_scores = grad_scores * block.scale
        grad_q = (grad_scores @ k).flatten(1, 2)
        grad_k = (grad_scores.transpose(-1, -2) @ q).sum(2)
        grad_v = (weights.transpose(-1, -2) @ grad_).sum(2)
        return grad_q.to(block.query.dtype), grad_k.to(block.key.dtype), grad_v.to(block.value.dtype)

    def _scores(self, block: BlockInputs) -> Tensor:
        """Scores of shape `(1, kv_heads, groups, num_queries, num_keys)`, -inf where masked."""
        q, k, mask = block.query, block.key, block.mask
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = _in_groups(q, k.shape[1]).to(dtype) @ k[:, :, None].to(dtype).transpose(-1, -2) * block.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if block.is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def get_block_kernel(kernel: TorchKernel, softcap: float | None) -> BlockKernel:
    """Return the code of a kernel, of any but the varlen kernel, which knows no blocks."""
    if kernel is TorchKernel.CPU_FLASH:
        return CpuFlash()
    if kernel is TorchKernel.CUDA_FLASH:
        return CudaFlash()
    assert kernel is TorchKernel.MATH, f"{kernel} does not run block by block"
    return BlockMath(softcap)


def _bias(block: BlockInputs) -> Tensor | None:
    """The mask as numbers to add to the scores, 0 or -inf."""
    if block.mask is None:
        return None
    zeros = torch.zeros(block.mask.shape, dtype=block.query.dtype, device=block.mask.device)
    return zeros.masked_fill_(~block.mask, -torch.inf)[None, None]


def _in_groups(x: Tensor, kv_heads: int) -> Tensor:
    """Split the heads, dimension 1, into key-value heads and the groups of query heads that share them."""
    return x.view(x.shape[0], kv_heads, -1, *x.shape[2:])
