"""The attention function that transformers calls: tree attention on a row of trees, the stock one on other batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from .inputs import AttentionInputs, check_layer, scale_by_depth
from .tree_mask import TreeMask


class AttentionFunction(Protocol):
    """
    Attention function of a layer, as transformers' `AttentionInterface` calls it.

    Args:
        module (`torch.nn.Module`):
            Attention layer.
        query (`torch.Tensor` of shape `(batch, heads, num_queries, head_dim)`):
            Queries.
        key (`torch.Tensor` of shape `(batch, kv_heads, num_keys, head_dim)`):
            Keys.
        value (`torch.Tensor` of shape `(batch, kv_heads, num_keys, value_dim)`):
            Values.
        attention_mask (`object`):
            `TreeMask` on a row of trees, otherwise whatever the stock mask function returned.
        dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of attention weights.
        scaling (`float`, *optional*):
            Factor of the scores, `head_dim ** -0.5` if not given.
        softcap (`float`, *optional*):
            Softcap of the scores.
        s_aux (`torch.Tensor` of shape `(heads,)`, *optional*):
            Attention sinks.
        **kwargs (`Any`):
            Further arguments that the layer passes.

    Returns:
        `tuple`: Output of shape `(batch, num_queries, heads, value_dim)`, and attention weights or log-sum-exp where
        the stock function returns them.

    Raises:
        `ValueError`: If the layer asks for what a tree or the kernel cannot do.
    """

    def __call__(
        self,
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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention."""
        ...


class TreeAttention(Protocol):
    """
    Attention of a layer on a row of trees.

    Args:
        module (`torch.nn.Module`):
            Attention layer.
        inputs (`AttentionInputs`):
            Tensors of the layer.
        mask (`TreeMask`):
            Mask of the layer.
        options (`Mapping[str, Any]`):
            Further arguments that the layer passes.

    Returns:
        `torch.Tensor` of shape `(1, row_length, heads, value_dim)`: The output.
    """

    def __call__(
        self, module: torch.nn.Module, inputs: AttentionInputs, mask: TreeMask, options: Mapping[str, Any]
    ) -> torch.Tensor:
        """Compute attention."""
        ...


def tree_attention_or(plain: AttentionFunction, on_tree: TreeAttention) -> AttentionFunction:
    """
    Return the attention function to register with transformers.

    Args:
        plain (`AttentionFunction`):
            Attention of batches without a tree (generation, plain rows).
        on_tree (`TreeAttention`):
            Attention of a row of trees.
    """

    def attention_function(
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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not isinstance(attention_mask, TreeMask):
            return plain(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap,
                s_aux=s_aux, **kwargs,
            )  # fmt: skip
        check_layer(module, attention_mask, query, dropout, kwargs)
        mask = attention_mask.on(query.device)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query = scale_by_depth(module, query, mask.tree)
        return on_tree(module, AttentionInputs(query, key, value, scale, softcap, s_aux), mask, kwargs), None

    return attention_function
