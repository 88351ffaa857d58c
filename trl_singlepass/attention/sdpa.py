"""Backend for `attn_implementation="sdpa"` and `"eager"`: PyTorch's own kernels, on trees and on ordinary batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .block_kernels import get_block_kernel
from .blocks import block_tree_attention
from .flex import flex_tree_attention
from .interface import AttentionInputs, tree_attention_or
from .kernel_choice import DeviceTraits, TorchKernel, choose_torch_kernel
from .kv_cache import KVCacheView
from .tree_mask import TreeMask
from .varlen import varlen_tree_attention
from .varlen_kernels import TorchFlash


def torch_tree_attention(inputs: AttentionInputs, mask: TreeMask, cache: KVCacheView | None = None) -> Tensor:
    """
    Return attention of a row of trees, `(1, row_length, heads, value_dim)`, by PyTorch's fastest kernel for it.

    Takes inputs in one dtype; `cache` has the keys and values of ancestors outside the row.
    """
    kernel = choose_torch_kernel(
        DeviceTraits.from_device(inputs.query.device),
        inputs.query.dtype,
        inputs.head_dim,
        mask.rule,
        has_softcap=inputs.softcap is not None,
        has_cache=cache is not None,
    )
    if kernel is TorchKernel.VARLEN:
        deterministic = torch.are_deterministic_algorithms_enabled()
        return varlen_tree_attention(inputs, mask, TorchFlash(), deterministic, cache)
    if kernel is TorchKernel.FLEX:
        return flex_tree_attention(inputs, mask)
    return block_tree_attention(inputs, mask, get_block_kernel(kernel, inputs.softcap), cache).contiguous()


def _on_tree(module: torch.nn.Module, inputs: AttentionInputs, mask: TreeMask, options: Mapping[str, Any]) -> Tensor:
    return torch_tree_attention(inputs.to_common_dtype(), mask, mask.tree.kv_cache(module, mask.local_size))


def plain_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention of an ordinary batch: stock SDPA, or the whole score matrix for what SDPA cannot compute."""
    if softcap is None and s_aux is None:
        stock: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return stock
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    inputs = AttentionInputs(query, key, value, scale, softcap, s_aux)
    return score_matrix_attention(inputs, attention_mask).transpose(1, 2).contiguous(), None


def score_matrix_attention(inputs: AttentionInputs, mask: Tensor | None) -> Tensor:
    """
    Return attention with a softcap or sinks, from the whole score matrix: O(queries × keys) memory.

    The mask is broadcastable to `(batch, heads, num_queries, num_keys)`: `True` where a query attends, or numbers that
    are added to the scores. `None` means causal, the last query seeing the last key. Returns shape
    `(batch, heads, num_queries, value_dim)`.
    """
    query, softcap, sinks = inputs.query, inputs.softcap, inputs.sinks
    groups = query.shape[1] // inputs.key.shape[1]
    key, value = inputs.key.repeat_interleave(groups, 1), inputs.value.repeat_interleave(groups, 1)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.transpose(-1, -2)).to(dtype) * inputs.scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        num_queries, num_keys = scores.shape[-2:]
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    # The lowest finite number: a padding query that sees no key gets some average, not NaN.
    lowest = torch.finfo(dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (scores + mask).clamp(min=lowest)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1).to(query.dtype)
    return (weights[..., :-1] if sinks is not None else weights) @ value


sdpa_forward = tree_attention_or(plain_forward, _on_tree)
"""The [`AttentionFunction`] of `sdpa` and `eager`."""
