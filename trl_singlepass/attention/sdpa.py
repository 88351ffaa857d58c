"""Backend for `attn_implementation="sdpa"` and `"eager"`: tree attention on PyTorch's own kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .block_kernels import kernel_for
from .blocks import BlockAttention
from .dense import dense_attention
from .inputs import query_at_depth
from .kv_cache import MemoryAccess
from .tree_mask import TreeMask


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: TreeMask,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    memory: MemoryAccess | None = None,
) -> torch.Tensor:
    """
    Return attention of a row of trees: block-sparse, memory linear in tokens.

    Args:
        query (`torch.Tensor` of shape `(1, heads, row_length, head_dim)`):
            Queries.
        key (`torch.Tensor` of shape `(1, kv_heads, row_length, head_dim)`):
            Keys; `kv_heads` divides `heads`.
        value (`torch.Tensor` of shape `(1, kv_heads, row_length, value_dim)`):
            Values.
        mask (`TreeMask`):
            Rule of the layer.
        scale (`float`):
            Factor of the scores.
        softcap (`float`, *optional*):
            Scores become `softcap · tanh(score / softcap)` (Gemma 2).
        sinks (`torch.Tensor` of shape `(heads,)`, *optional*):
            Logit per head of a key without value (gpt-oss).
        memory (`MemoryAccess`, *optional*):
            Keys and values of ancestors outside the row.

    Returns:
        `torch.Tensor` of shape `(1, heads, row_length, value_dim)`: The outputs.
    """
    kernel = kernel_for(query, softcap=softcap, masked=not mask.is_causal)
    # Kernels want one head size: zeros added to queries and keys change no score, and those of values are cut off.
    value_dim = value.shape[-1]
    width = max(query.shape[-1], value_dim)
    query, key, value = (
        x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value)
    )
    out: torch.Tensor = BlockAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, sinks, mask, kernel, scale, memory
    )
    return out[..., :value_dim]


def sdpa_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attention function of a layer, as transformers' `AttentionInterface` calls it.

    Args:
        module (`torch.nn.Module`):
            Attention layer.
        query (`torch.Tensor` of shape `(batch, heads, length, head_dim)`):
            Queries.
        key (`torch.Tensor` of shape `(batch, kv_heads, length, head_dim)`):
            Keys.
        value (`torch.Tensor` of shape `(batch, kv_heads, length, value_dim)`):
            Values.
        attention_mask (`Any`):
            `TreeMask` on a tree, the stock mask of `sdpa` otherwise.
        dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of attention weights.
        scaling (`float`, *optional*):
            Factor of the scores, `head_dim ** -0.5` if not given.
        softcap (`float`, *optional*):
            Softcap of the scores.
        s_aux (`torch.Tensor` of shape `(heads,)`, *optional*):
            Attention sinks.
        **kwargs (`Any`):
            What else the layer passes; stock attention reads it on ordinary batches.

    Returns:
        `tuple[torch.Tensor, None]`: Output of shape `(batch, length, heads, value_dim)`, and no weights.

    Raises:
        `ValueError`: If the layer asks for attention dropout or a position bias on a tree.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(attention_mask, TreeMask):
        check_layer(module, attention_mask, query, dropout, kwargs)
        query, key, value = in_one_dtype(query_at_depth(module, query, attention_mask.tree), key, value)
        memory = attention_mask.tree.memory_of(module, attention_mask.local_size)
        out = tree_attention(query, key, value, attention_mask, scale, softcap, s_aux, memory)
    elif softcap is not None or s_aux is not None:
        out = dense_attention(query, key, value, attention_mask, scale, softcap, s_aux)
    else:
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    return out.transpose(1, 2).contiguous(), None


def in_one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    Cast queries, keys and values as stock SDPA does: under autocast, norms leave queries in float32, values are not.

    Args:
        *tensors (`torch.Tensor`):
            Queries, keys and values.
    """
    device, dtype = tensors[0].device.type, tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


def check_layer(
    module: torch.nn.Module, mask: TreeMask, query: torch.Tensor, dropout: float, kwargs: dict[str, Any]
) -> None:
    """
    Note that a layer received the tree, and refuse what a tree cannot honour.

    Args:
        module (`torch.nn.Module`):
            Attention layer.
        mask (`TreeMask`):
            Rule of the layer.
        query (`torch.Tensor` of shape `(batch, heads, length, head_dim)`):
            Queries.
        dropout (`float`):
            Dropout of attention weights.
        kwargs (`dict[str, Any]`):
            What else the layer passes.

    Raises:
        `ValueError`: If the row does not fit the tree, or the layer asks for dropout or a position bias.
    """
    name = type(module).__name__
    if (query.shape[0], query.shape[2]) != (1, mask.tree.plan.length):
        raise ValueError(
            f"{name} got {query.shape[0]} rows of {query.shape[2]} tokens on a tree of {mask.tree.plan.length}. "
            "Pass the batch of `DataCollatorForSinglePass` as it is, without a cache."
        )
    if dropout:
        raise ValueError(
            f"{name} asks for attention dropout {dropout}, which one pass cannot draw as N separate passes would. Set "
            "the model config's attention dropout (`attention_dropout`, `attn_pdrop`, …) to 0."
        )
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{name} adds a position bias to its scores, which tree attention does not support.")
    mask.tree.attended_by.add(module)
