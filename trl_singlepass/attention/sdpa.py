"""Backend for `attn_implementation="sdpa"` and `"eager"`: tree attention on PyTorch's own kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .block_kernels import get_block_kernel
from .blocks import block_tree_attention
from .flex import flex_tree_attention
from .inputs import AttentionInputs
from .interface import tree_attention_or
from .kernel_choice import DeviceTraits, TorchKernel, choose_torch_kernel
from .kv_cache import KVCacheView
from .plain import plain_forward
from .tree_mask import TreeMask
from .varlen import varlen_tree_attention
from .varlen_kernels import TorchFlash


def torch_tree_attention(inputs: AttentionInputs, mask: TreeMask, cache: KVCacheView | None = None) -> torch.Tensor:
    """
    Return attention of a row of trees, shape `(1, row_length, heads, value_dim)`, by the fastest of PyTorch's kernels
    that computes it.

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


def _on_tree(
    module: torch.nn.Module, inputs: AttentionInputs, mask: TreeMask, options: Mapping[str, Any]
) -> torch.Tensor:
    return torch_tree_attention(inputs.to_common_dtype(), mask, mask.tree.kv_cache(module, mask.local_size))


sdpa_forward = tree_attention_or(plain_forward, _on_tree)
"""The [`AttentionFunction`] of `sdpa` and `eager`."""
