"""Backends for `flash_attention_2`, `flash_attention_3` and flash kernels of the Hub: varlen tree attention."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.flash_attention import flash_attention_forward, get_target_dtype

from .inputs import query_at_depth
from .sdpa import check_layer, sdpa_forward
from .tree_mask import TreeMask
from .varlen import VarlenAttention, VarlenKernel
from .varlen_kernels import flash_kernel
from .varlen_plan import varlen_calls


def varlen_tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: TreeMask,
    kernel: VarlenKernel,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """
    Return attention of a row of trees by a varlen flash kernel.

    Args:
        query (`torch.Tensor` of shape `(1, heads, row_length, head_dim)`):
            Queries.
        key (`torch.Tensor` of shape `(1, kv_heads, row_length, head_dim)`):
            Keys; `kv_heads` divides `heads`.
        value (`torch.Tensor` of shape `(1, kv_heads, row_length, value_dim)`):
            Values.
        mask (`TreeMask`):
            Rule of the layer.
        kernel (`VarlenKernel`):
            Kernel.
        scale (`float`):
            Factor of the scores.
        softcap (`float`, *optional*):
            Scores become `softcap · tanh(score / softcap)` (Gemma 2).
        sinks (`torch.Tensor` of shape `(heads,)`, *optional*):
            Logit per head of a key without value (gpt-oss).
        deterministic (`bool`, *optional*, defaults to `False`):
            Whether gradients are added up in a fixed order, which is slower.

    Returns:
        `torch.Tensor` of shape `(1, row_length, heads, value_dim)`: The outputs.
    """
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    width = -(-max(head_dim, value_dim) // 8) * 8  # kernels want one head size, a multiple of 8: zeros change nothing
    tokens = (_as_tokens(x, width) for x in (query, key, value))
    calls = mask.derived(varlen_calls)
    out: torch.Tensor = VarlenAttention.apply(  # type: ignore[no-untyped-call]
        *tokens, sinks, calls, kernel, scale, softcap or 0.0, deterministic
    )
    return out[None, ..., :value_dim]


def _as_tokens(x: torch.Tensor, width: int) -> torch.Tensor:
    """`(1, heads, row_length, head_dim)` to `(row_length, heads, width)`, without a copy where the width is right."""
    x = x.transpose(1, 2)[0]
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def varlen_forward_of(implementation: str) -> Callable[..., tuple[torch.Tensor, Any]]:
    """
    Return the attention function to register for an `attn_implementation`.

    Args:
        implementation (`str`):
            `attn_implementation` of transformers, or `"torch_varlen"` for PyTorch's own varlen kernel.

    Returns:
        `Callable`: Function of a layer, as transformers' `AttentionInterface` calls it. It raises `ValueError` where a
        tree or the kernel cannot do what the layer asks for.
    """

    def forward(
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
    ) -> tuple[torch.Tensor, Any]:
        if not isinstance(attention_mask, TreeMask):
            if softcap is not None or s_aux is not None:
                kwargs.update(softcap=softcap, s_aux=s_aux)
            return _stock(implementation, module)(
                query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        check_layer(module, attention_mask, query, dropout, kwargs)
        assert attention_mask.tree.memory_of(module) is None, "waves hand keys from row to row on sdpa only"
        kernel = flash_kernel(implementation)
        dtype = get_target_dtype(query, module) or query.dtype
        _check_kernel(implementation, kernel, dtype, softcap)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query = query_at_depth(module, query, attention_mask.tree)
        query, key, value = (x.to(dtype) for x in (query, key, value))
        deterministic = kwargs.get("deterministic")
        if deterministic is None:
            deterministic = is_deterministic()
        out = varlen_tree_attention(query, key, value, attention_mask, kernel, scale, softcap, s_aux, deterministic)
        return out, None

    return forward


def is_deterministic() -> bool:
    """Return whether gradients shall be added up in a fixed order: by PyTorch's switch, or by transformers' own."""
    return torch.are_deterministic_algorithms_enabled() or os.getenv("FLASH_ATTENTION_DETERMINISTIC", "0") == "1"


def _check_kernel(implementation: str, kernel: VarlenKernel, dtype: torch.dtype, softcap: float | None) -> None:
    if softcap is not None and not kernel.has_softcap:
        raise ValueError(
            f"The model caps its scores (softcap {softcap}), which the kernel of {implementation!r} cannot do. Load "
            "it with attn_implementation='flash_attention_2' or 'flex_attention'."
        )
    if dtype not in kernel.dtypes:
        raise ValueError(
            f"The kernel of {implementation!r} computes in half precision, the model in {dtype}. Load the model with "
            "dtype=torch.bfloat16, train with bf16=True, or use attn_implementation='sdpa'."
        )


def _stock(implementation: str, module: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, Any]]:
    """The function of transformers that an ordinary batch runs, with its layer."""
    if implementation == "torch_varlen":
        return lambda *args, **kwargs: sdpa_forward(module, *args, **kwargs)
    layer = _Renamed(module, config=_Renamed(module.config, _attn_implementation=implementation))
    return lambda *args, **kwargs: flash_attention_forward(layer, *args, **kwargs)


class _Renamed:
    """An object with some attributes replaced: stock code reads the kernel's name off the layer's config."""

    def __init__(self, wrapped: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)
