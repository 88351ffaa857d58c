"""Ordinary batches under `sdpa` and `eager`: stock SDPA, or the whole score matrix for what SDPA cannot compute."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .inputs import AttentionInputs


def plain_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention of an ordinary batch; an [`AttentionFunction`]."""
    if softcap is None and s_aux is None:
        stock: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return stock
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    inputs = AttentionInputs(query, key, value, scale, softcap, s_aux)
    return score_matrix_attention(inputs, attention_mask).transpose(1, 2).contiguous(), None


def score_matrix_attention(inputs: AttentionInputs, mask: torch.Tensor | None) -> torch.Tensor:
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
