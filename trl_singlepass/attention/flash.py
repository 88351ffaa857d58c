"""Backends for `flash_attention_2`, `flash_attention_3` and flash kernels of the Hub: varlen tree attention."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.flash_attention import flash_attention_forward, get_target_dtype

from .interface import AttentionFunction, AttentionInputs, tree_attention_or
from .sdpa import plain_forward
from .tree_mask import TreeMask
from .varlen import varlen_tree_attention
from .varlen_kernels import VarlenKernel, flash_kernel


def varlen_forward(implementation: str) -> AttentionFunction:
    """
    Return the attention function of a flash kernel: an `attn_implementation` of transformers, or `"torch_varlen"`,
    PyTorch's own varlen kernel.
    """

    def on_tree(
        module: torch.nn.Module, inputs: AttentionInputs, mask: TreeMask, options: Mapping[str, Any]
    ) -> Tensor:
        kernel = flash_kernel(implementation)
        dtype = get_target_dtype(inputs.query, module) or inputs.query.dtype
        _check_kernel(implementation, kernel, dtype, inputs)
        deterministic = options.get("deterministic")
        if deterministic is None:
            deterministic = is_deterministic()
        cache = mask.tree.kv_cache(module, mask.local_size)
        return varlen_tree_attention(inputs.to(dtype), mask, kernel, deterministic, cache)

    plain = plain_forward if implementation == "torch_varlen" else _stock_flash(implementation)
    return tree_attention_or(plain, on_tree)


def is_deterministic() -> bool:
    """Return whether gradients are to be added up in a fixed order: PyTorch's switch, or transformers' own."""
    return torch.are_deterministic_algorithms_enabled() or os.getenv("FLASH_ATTENTION_DETERMINISTIC", "0") == "1"


def _check_kernel(implementation: str, kernel: VarlenKernel, dtype: torch.dtype, inputs: AttentionInputs) -> None:
    if inputs.softcap is not None and not kernel.has_softcap:
        raise ValueError(
            f"The model caps its scores (softcap {inputs.softcap}), which the kernel of {implementation!r} cannot do. "
            "Load it with attn_implementation='flash_attention_2' or 'flex_attention'."
        )
    if inputs.head_dim > kernel.max_head_dim:
        raise ValueError(
            f"The model has heads of size {inputs.head_dim}, and the kernel of {implementation!r} takes up to "
            f"{kernel.max_head_dim}. Load the model with attn_implementation='sdpa' or 'flex_attention'."
        )
    if dtype not in kernel.dtypes:
        raise ValueError(
            f"The kernel of {implementation!r} computes in half precision, the model in {dtype}. Load the model with "
            "dtype=torch.bfloat16, train with bf16=True, or use attn_implementation='sdpa'."
        )


def _stock_flash(implementation: str) -> AttentionFunction:
    def plain(
        module: Any, *args: Any, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer = _Renamed(module, config=_Renamed(module.config, _attn_implementation=implementation))
        if softcap is not None or s_aux is not None:
            kwargs.update(softcap=softcap, s_aux=s_aux)
        result: tuple[Tensor, None] = flash_attention_forward(layer, *args, **kwargs)
        return result

    return plain


class _Renamed:
    """An object with some attributes replaced: stock code reads the kernel's name from the layer's config."""

    def __init__(self, wrapped: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)
