"""Backend for `attn_implementation="flex_attention"`: one compiled kernel that skips the blocks of other branches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention import flex_attention as torch_flex
from transformers.integrations.flex_attention import flex_attention_forward

from .block_mask import block_mask_of
from .inputs import query_at_depth
from .sdpa import check_layer, in_one_dtype
from .tree_mask import TreeMask


# Devices for which PyTorch has no backward of FlexAttention (2.15 included).
_WITHOUT_BACKWARD = {"cpu", "mps"}
_MAX_VARIANTS = 64


@cache
def compiled_flex_attention() -> Callable[..., Any]:
    """
    Return FlexAttention compiled for rows of any length; compiled at the first call.

    A model needs one variant per mask type, with and without gradients, and a few more for its dtypes: more than the 8
    that PyTorch allows. Running out of them is an error here, not a silent slide into O(tokens²) memory.
    """
    compiled = torch.compile(torch_flex.flex_attention, dynamic=True, fullgraph=True)
    patched: Callable[..., Any] = torch._dynamo.config.patch(recompile_limit=_MAX_VARIANTS)(compiled)
    return patched


def flex_tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: TreeMask,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    kernel_options: dict[str, Any] | None = None,
) -> torch.Tensor:
    """
    Return attention of a row of trees by FlexAttention.

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
        kernel_options (`dict[str, Any]`, *optional*):
            FlexAttention's own, such as `{"BACKEND": "FLASH"}` for FlashAttention 4.

    Returns:
        `torch.Tensor` of shape `(1, heads, row_length, value_dim)`: The outputs.
    """
    attend = compiled_flex_attention()
    options: dict[str, Any] = {
        "block_mask": mask.derived(block_mask_of, block_size(query.device, kernel_options)),
        "score_mod": None if softcap is None else _score_mod(softcap, query.dtype, query.device),
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
        "kernel_options": kernel_options,
    }
    if sinks is None:
        out: torch.Tensor = attend(query, key, value, **options)
        return out
    out, lse = attend_with_lse(attend, query, key, value, options)
    # A sink takes part in the softmax without a value: it only scales the output.
    weight = torch.sigmoid(lse - sinks.to(lse.dtype)[None, :, None])
    return out * weight.to(out.dtype)[..., None]


def attend_with_lse(
    attend: Callable[..., Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the output and the log-sum-exp of the scores, from any release of PyTorch.

    Args:
        attend (`Callable`):
            FlexAttention, compiled or not.
        query (`torch.Tensor` of shape `(1, heads, row_length, head_dim)`):
            Queries.
        key (`torch.Tensor` of shape `(1, kv_heads, row_length, head_dim)`):
            Keys.
        value (`torch.Tensor` of shape `(1, kv_heads, row_length, value_dim)`):
            Values.
        options (`dict[str, Any]`):
            What else FlexAttention takes.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Output, and log-sum-exp of shape `(1, heads, row_length)`.
    """
    if hasattr(torch_flex, "AuxRequest"):  # from PyTorch 2.9 on
        out, aux = attend(query, key, value, **options, return_aux=torch_flex.AuxRequest(lse=True))
        return out, aux.lse
    out, lse = attend(query, key, value, **options, return_lse=True)
    return out, lse


def block_size(device: torch.device, kernel_options: dict[str, Any] | None) -> tuple[int, int]:
    """
    Return the number of queries and keys that one block of the mask covers.

    Args:
        device (`torch.device`):
            Device that attention runs on.
        kernel_options (`dict[str, Any]`, *optional*):
            FlexAttention's own options.
    """
    if device.type == "cuda" and (kernel_options or {}).get("BACKEND") == "FLASH":
        # FlashAttention 4 works on two tiles of 128 queries at a time from Blackwell on.
        return (256, 128) if torch.cuda.get_device_capability(device)[0] >= 10 else (128, 128)
    return (128, 128)


@cache
def _score_mod(softcap: float, dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    # As a tensor: a captured number does not compile for rows of any length.
    cap = torch.tensor(softcap, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return cap * torch.tanh(score / cap)

    return score_mod


def flex_forward(
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
    """
    Attention function of a layer, as transformers' `AttentionInterface` calls it.

    Args:
        module (`torch.nn.Module`):
            Attention layer. `module.config.kernel_options`, where set, are FlexAttention's own options.
        query (`torch.Tensor` of shape `(batch, heads, length, head_dim)`):
            Queries.
        key (`torch.Tensor` of shape `(batch, kv_heads, length, head_dim)`):
            Keys.
        value (`torch.Tensor` of shape `(batch, kv_heads, length, value_dim)`):
            Values.
        attention_mask (`Any`):
            `TreeMask` on a tree, the stock mask of `flex_attention` otherwise.
        dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of attention weights.
        scaling (`float`, *optional*):
            Factor of the scores, `head_dim ** -0.5` if not given.
        softcap (`float`, *optional*):
            Softcap of the scores.
        s_aux (`torch.Tensor` of shape `(heads,)`, *optional*):
            Attention sinks.
        **kwargs (`Any`):
            What else the layer passes, `kernel_options` among them.

    Returns:
        `tuple`: Output of shape `(batch, length, heads, value_dim)`, and the log-sum-exp on ordinary batches.

    Raises:
        `ValueError`: If the layer asks for what a tree or FlexAttention cannot do.
    """
    options = kwargs.pop("kernel_options", None) or getattr(module.config, "kernel_options", None)
    if not isinstance(attention_mask, TreeMask):
        plain: tuple[torch.Tensor, torch.Tensor | None] = flex_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, s_aux=s_aux,
            dropout=dropout, kernel_options=options, **kwargs,
        )  # fmt: skip
        return plain
    check_layer(module, attention_mask, query, dropout, kwargs)
    assert attention_mask.tree.memory_of(module) is None, "waves hand keys from row to row on sdpa only"
    _check_backward(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = in_one_dtype(query_at_depth(module, query, attention_mask.tree), key, value)
    out = flex_tree_attention(query, key, value, attention_mask, scale, softcap, s_aux, options)
    return out.transpose(1, 2).contiguous(), None


def _check_backward(*tensors: torch.Tensor) -> None:
    device = tensors[0].device.type
    if device in _WITHOUT_BACKWARD and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            f"PyTorch's FlexAttention cannot be trained on device '{device}': it has no backward pass there. Load the "
            "model with attn_implementation='sdpa', or train on a GPU."
        )
