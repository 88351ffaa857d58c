"""Backend for `attn_implementation="sdpa"` and `"eager"`: tree attention on PyTorch's own kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .blocks import block_tree_attention
from .inputs import AttentionInputs
from .interface import tree_attention_or
from .plain import plain_forward
from .tree_mask import TreeMask


def _on_tree(
    module: torch.nn.Module, inputs: AttentionInputs, mask: TreeMask, options: Mapping[str, Any]
) -> torch.Tensor:
    cache = mask.tree.kv_cache(module, mask.local_size)
    return block_tree_attention(inputs.to_common_dtype(), mask, cache).contiguous()


sdpa_forward = tree_attention_or(plain_forward, _on_tree)
"""The [`AttentionFunction`] of `sdpa` and `eager`."""
