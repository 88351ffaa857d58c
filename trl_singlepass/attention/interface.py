"""What the attention layers of transformers hand to kernels, checked and corrected first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .context import Tree, current_tree
from .kv_cache import is_in_backward
from .tree_mask import TreeMask


Gradients = tuple[Tensor, Tensor, Tensor]
"""Gradients of queries, keys and values."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionInputs:
    """Tensors of one attention layer; on a row of trees, `batch` is 1, and both numbers are the length of the row."""

    query: Tensor  # (batch, heads, num_queries, head_dim)
    key: Tensor  # (batch, kv_heads, num_keys, head_dim); `kv_heads` divides `heads`
    value: Tensor  # (batch, kv_heads, num_keys, value_dim)
    scale: float  # factor of the scores
    softcap: float | None = None  # scores become `softcap · tanh(score / softcap)` (Gemma 2)
    sinks: Tensor | None = None  # (heads,): logit per head that takes part in the softmax without a key (gpt-oss)

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """Return the inputs with queries, keys and values cast to a dtype."""
        return replace(self, query=self.query.to(dtype), key=self.key.to(dtype), value=self.value.to(dtype))

    @property
    def head_dim(self) -> int:
        """Size of the heads, the larger one of keys and values."""
        return max(self.query.shape[-1], self.value.shape[-1])

    def with_one_head_dim(self, multiple: int = 1) -> AttentionInputs:
        """
        Return the inputs with all heads padded to one size, a multiple of `multiple`, as kernels want them.

        Zeros added to queries and keys change no score; those added to values add zeros to the output, to be cut off.
        """
        width = -(-self.head_dim // multiple) * multiple
        query, key, value = (
            x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
            for x in (self.query, self.key, self.value)
        )
        return replace(self, query=query, key=key, value=value)

    def to_common_dtype(self) -> AttentionInputs:
        """Return the inputs in one dtype, as stock SDPA does: under autocast, norms leave queries in float32."""
        dtype = torch.promote_types(self.query.dtype, torch.promote_types(self.key.dtype, self.value.dtype))
        device = self.query.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        return self.to(dtype)


def check_layer(
    module: torch.nn.Module, mask: TreeMask, query: Tensor, dropout: float, kwargs: Mapping[str, object]
) -> None:
    """Refuse what a tree cannot honour in a layer: a row that does not fit the tree, dropout, a position bias."""
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


def _leave_receipt(module: nn.Module, mask: TreeMask) -> None:
    """Note that a layer ran on the tree of the row; refuse the mask of another row, which a model has kept."""
    row = None if is_in_backward() else current_tree()
    if row is None:  # a checkpointed layer runs again
        return
    if mask.tree is not row:
        raise ValueError(
            f"{type(module).__name__} got the attention mask of another row: the model keeps masks, and reuses them "
            "for rows of the same length, which have other trees. Let it make its mask in each forward."
        )
    row.seen.add(module)


def scale_by_depth(module: Any, query: Tensor, tree: Tree) -> Tensor:
    """
    Correct the attention temperature of layers that compute it from the index in the row (Llama 4).

    On a tree it has to be computed from the depth, which these layers do not read from `position_ids`.

    Takes queries as the layer scaled them and returns them scaled by depth, shape `(1, heads, row_length, head_dim)`;
    the same object where the layer has no such temperature.

    Source: `Llama4TextAttention` of transformers; temperature tuning of arXiv 2501.19399.
    """
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query

    def temperature(positions: Tensor) -> Tensor:
        steps = torch.floor((positions.float() + 1.0) / module.floor_scale)
        return torch.log1p(steps) * float(module.attn_scale) + 1.0

    index = torch.arange(query.shape[2], device=query.device)
    if tree.group is not None:  # the layer counted from the start of a rank's part
        index = index % (query.shape[2] // tree.group.size)
    ratio = temperature(tree.depth[0]) / temperature(index)
    return query * ratio.to(query.dtype)[:, None]


AttentionFunction: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]
"""
Attention of a layer, as transformers' `AttentionInterface` calls it.

It takes the layer, `query` of shape `(batch, heads, num_queries, head_dim)`, `key` of shape
`(batch, kv_heads, num_keys, head_dim)`, `value` of shape `(batch, kv_heads, num_keys, value_dim)`, and as
`attention_mask` a `TreeMask` on a row of trees, otherwise whatever the stock mask function returned. Among the layer's
further arguments are `dropout`, `scaling` (factor of the scores, `head_dim ** -0.5` by default), `softcap` (of the
scores), and `s_aux` (attention sinks, of shape `(heads,)`). It returns the output, of shape
`(batch, num_queries, heads, value_dim)`, and attention weights or log-sum-exp where the stock function returns them.
"""
TreeAttention: TypeAlias = Callable[[nn.Module, AttentionInputs, TreeMask, Mapping[str, Any]], Tensor]
"""
Attention of a layer on a row of trees, shape `(1, row_length, heads, value_dim)`; the mapping holds further arguments
that the layer passes.
"""


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
        _leave_receipt(module, attention_mask)
        mask = attention_mask.on(query.device)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query = scale_by_depth(module, query, mask.tree)
        return on_tree(module, AttentionInputs(query, key, value, scale, softcap, sinks), mask, options), None

    return attention_function


def add_sinks_(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """
    Add a sink to the softmax after the fact: it only scales the output, by `sigmoid(lse - sink)`.

    Changes the output, `(..., heads, num_queries, value_dim)`, and the log-sum-exp, `(..., heads, num_queries)`, in
    place; `sinks` has shape `(heads,)`.
    """
    sinks = sinks[:, None]
    out *= (lse - sinks).sigmoid_()[..., None]
    torch.logaddexp(lse, sinks, out=lse)


def sink_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """
    Return the gradient of the sinks, `-Σ weight · rowsum(grad · out)` with the weight `exp(sink - lse)`.

    Takes the output and its gradient, `(heads, num_queries, value_dim)`, the log-sum-exp, `(heads, num_queries)`, both
    with sinks, and `sinks` of shape `(heads,)`; returns `(heads,)`.
    """
    delta = (grad.to(lse.dtype) * out).sum(-1)
    weight = (sinks[:, None] - lse).exp_()
    # Negated and rounded to the sinks' dtype in one kernel; `torch.neg` takes no `out` of another dtype.
    return torch.mul(torch.einsum("hq,hq->h", weight, delta), -1, out=torch.empty_like(sinks))
