"""Llama 4 scales queries by their index in the row; on a tree that has to be their depth."""

from __future__ import annotations

from typing import Any

import torch

from .context import Tree


def query_at_depth(module: Any, query: torch.Tensor, tree: Tree) -> torch.Tensor:
    """
    Correct the attention temperature of layers that read it off the row's index instead of `position_ids`.

    Args:
        module (`torch.nn.Module`):
            Attention layer.
        query (`torch.Tensor` of shape `(1, heads, row_length, head_dim)`):
            Queries as the layer scaled them.
        tree (`Tree`):
            Tree of the row.

    Returns:
        `torch.Tensor` of shape `(1, heads, row_length, head_dim)`: Queries scaled by depth; the same object where the
        layer has no such temperature.

    Source: `Llama4TextAttention` of transformers; temperature tuning of arXiv 2501.19399.
    """
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query

    def temperature(positions: torch.Tensor) -> torch.Tensor:
        steps = torch.floor((positions.float() + 1.0) / module.floor_scale)
        return torch.log1p(steps) * float(module.attn_scale) + 1.0

    index = torch.arange(query.shape[2], device=query.device)
    ratio = temperature(tree.depth[0]) / temperature(index)
    return query * ratio.to(query.dtype)[:, None]
