"""Dense attention: the reference for every backend, and what runs ordinary batches that stock SDPA cannot."""

from __future__ import annotations

import torch


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Return attention computed from the whole score matrix: O(queries × keys) memory.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, num_queries, head_dim)`):
            Queries.
        key (`torch.Tensor` of shape `(batch, kv_heads, num_keys, head_dim)`):
            Keys; `kv_heads` divides `heads`.
        value (`torch.Tensor` of shape `(batch, kv_heads, num_keys, value_dim)`):
            Values.
        mask (`torch.Tensor`, *optional*, broadcastable to `(batch, heads, num_queries, num_keys)`, `torch.bool`):
            `True` where a query attends. `None` means causal, the last query seeing the last key.
        scale (`float`):
            Factor of the scores.
        softcap (`float`, *optional*):
            Scores become `softcap · tanh(score / softcap)` (Gemma 2).
        sinks (`torch.Tensor` of shape `(heads,)`, *optional*):
            Logit per head of a key without value (gpt-oss).

    Returns:
        `torch.Tensor` of shape `(batch, heads, num_queries, value_dim)`: The outputs.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.transpose(-1, -2)).to(dtype) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        num_queries, num_keys = scores.shape[-2:]
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    # The lowest finite number: a padding query that sees no key gets some average, not NaN.
    scores = scores.masked_fill(~mask, torch.finfo(dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1).to(query.dtype)
    return (weights[..., :-1] if sinks is not None else weights) @ value
