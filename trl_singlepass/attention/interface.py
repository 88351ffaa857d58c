"""The attention function that transformers calls: tree attention on a row of trees, the stock one on other batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from .inputs import AttentionInputs, check_layer, scale_by_depth
from .tree_mask import TreeMask


class AttentionFunction(Protocol):
    """
    Attention function of a layer, as transformers' `AttentionInterface` calls it.

    Takes `query` of shape `(batch, heads, num_queries, head_dim)`, `key` of shape
    `(batch, kv_heads, num_keys, head_dim)`, `value` of shape `(batch, kv_heads, num_keys, value_dim)`, and as
    `attention_mask` a `TreeMask` on a row of trees, otherwise whatever the stock mask function returned. Among the
    layer's further arguments are `dropout`, `scaling` (factor of the scores, `head_dim ** -0.5` by default), `softcap`
    (of the scores), and `s_aux` (attention sinks, of shape `(heads,)`).

    Returns the output, of shape `(batch, num_queries, heads, value_dim)`, and attention weights or log-sum-exp where
    the stock function returns them. Raises `ValueError` if the layer asks for what a tree or the kernel cannot do.
    """

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention."""
        ...


class TreeAttention(Protocol):
    """
    Attention of a layer on a row of trees: returns the output, of shape `(1, row_length, heads, value_dim)`.

    `options` are further arguments that the layer passes.
    """

    def __call__(
        self, module: nn.Module, inputs: AttentionInputs, mask: TreeMask, options: Mapping[str, Any]
    ) -> Tensor:
        """Compute attention."""
        ...


def tree_attention_or(plain: AttentionFunction, on_tree: TreeAttention) -> AttentionFunction:
    """
    Return the attention function to register with transformers: `on_tree` on a row of trees, `plain` on other batches
    (generation, plain rows).
    """

    def attention_function(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(attention_mask, TreeMask):
            return plain(module, query, key, value, attention_mask, **options)
        dropout, scaling, softcap, sinks = (
            options.pop(name, None) for name in ("dropout", "scaling", "softcap", "s_aux")
        )
        check_layer(module, attention_mask, query, dropout or 0.0, options)
        mask = attention_mask.on(query.device)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query = scale_by_depth(module, query, mask.tree)
        return on_tree(module, AttentionInputs(query, key, value, scale, softcap, sinks), mask, options), None

    return attention_function
