"""Backend for `attn_implementation="flex_attention"`: one compiled kernel that skips blocks of other branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from transformers.integrations.flex_attention import flex_attention_forward

from .block_mask import build_block_mask
from .interface import AttentionInputs, tree_attention_or
from .kernel_choice import DeviceTraits
from .tree_mask import TreeMask


# Devices for which PyTorch has no backward of FlexAttention (2.15 included).
_WITHOUT_BACKWARD = {"cpu", "mps"}
# Compute capabilities with 99 KiB of shared memory: RTX 30, 40 and 50, A10, A40, L4, L40.
_WITH_LITTLE_SHARED_MEMORY = {(8, 6), (8, 9), (12, 0), (12, 1)}
_SMALL_BLOCKS: dict[str, object] = {"num_stages": 1, "BLOCK_M1": 32, "BLOCK_N1": 32, "BLOCK_M2": 32, "BLOCK_N2": 32}
_MAX_VARIANTS = 64
KernelOptions = dict[str, object]
"""FlexAttention's `kernel_options`, such as `{"BACKEND": "FLASH"}` for FlashAttention 4."""


@cache
def compiled_flex_attention() -> Callable[..., Any]:
    """
    Return FlexAttention, to be compiled at its first call, for rows of any length.

    A model needs one variant per mask type, with and without gradients, and a few more for its dtypes: more than the 8
    that PyTorch allows. With `fullgraph`, running out of variants is an error instead of a silent fall back to
    O(tokens²) memory.
    """
    compiled = torch.compile(torch_flex.flex_attention, dynamic=True, fullgraph=True)
    patched: Callable[..., Any] = torch._dynamo.config.patch(recompile_limit=_MAX_VARIANTS)(compiled)
    return patched


def flex_tree_attention(
    inputs: AttentionInputs, mask: TreeMask, kernel_options: KernelOptions | None = None
) -> Tensor:
    """Return attention of a row of trees by FlexAttention, shape `(1, row_length, heads, value_dim)`."""
    query, key, value, softcap = inputs.query, inputs.key, inputs.value, inputs.softcap
    attend = compiled_flex_attention()
    options: dict[str, Any] = {
        "block_mask": mask.build_once(build_block_mask, block_size(query.device, kernel_options)),
        "score_mod": None if softcap is None else _score_mod(softcap, query.dtype, query.device),
        "scale": inputs.scale,
        "enable_gqa": query.shape[1] != key.shape[1],
        "kernel_options": _with_defaults(kernel_options, query),
    }
    if inputs.sinks is None:
        out: Tensor = attend(query, key, value, **options)
    else:
        out, lse = attend_with_lse(attend, inputs, options)
        # A sink takes part in the softmax without a value: it only scales the output.
        weight = torch.sigmoid(lse - inputs.sinks.to(lse.dtype)[None, :, None])
        out = out * weight.to(out.dtype)[..., None]
    return out.transpose(1, 2).contiguous()


def attend_with_lse(
    attend: Callable[..., Any], inputs: AttentionInputs, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of the scores, `(1, heads, row_length)`, with any release of PyTorch."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if hasattr(torch_flex, "AuxRequest"):  # from PyTorch 2.9 on
        out, aux = attend(query, key, value, **options, return_aux=torch_flex.AuxRequest(lse=True))
        return out, aux.lse
    out, lse = attend(query, key, value, **options, return_lse=True)
    return out, lse


def block_size(device: torch.device, kernel_options: KernelOptions | None) -> tuple[int, int]:
    """Return the number of queries and keys that one block of the mask covers."""
    if device.type == "cuda" and (kernel_options or {}).get("BACKEND") == "FLASH":
        # FlashAttention 4 works on two tiles of 128 queries at a time from Blackwell on.
        return (256, 128) if torch.cuda.get_device_capability(device)[0] >= 10 else (128, 128)
    return (128, 128)


def _with_defaults(kernel_options: KernelOptions | None, query: Tensor) -> KernelOptions | None:
    """
    Options with which PyTorch's kernels run on every row and GPU; a `BACKEND` of the user's own decides by itself.

    Rows of fewer than 128 tokens are kept off FlexAttention's decoding kernel. With grouped heads, it finds no block
    size for them (`NoValidChoicesError` with PyTorch 2.13, for 101 tokens and two query heads per key).

    Heads above 128 get smaller blocks and one pipeline stage on GPUs with 99 KiB of shared memory. PyTorch 2.13 takes
    sizes for them that need up to 149 KiB forward and 133 KiB backward with heads of 256.
    """
    if query.device.type in _WITHOUT_BACKWARD or "BACKEND" in (kernel_options or {}):
        return kernel_options
    options: KernelOptions = {"FORCE_USE_FLEX_ATTENTION": True}
    if query.shape[-1] > 128 and DeviceTraits.from_device(query.device).capability in _WITH_LITTLE_SHARED_MEMORY:
        options |= _SMALL_BLOCKS
    return options | (kernel_options or {})


@cache
def _score_mod(softcap: float, dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    # As a tensor: a captured number does not compile for rows of any length.
    cap = torch.tensor(softcap, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


def _plain(
    module: Any, *args: Any, kernel_options: KernelOptions | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    options = kernel_options or _kernel_options(module)
    result: tuple[Tensor, Tensor | None] = flex_attention_forward(module, *args, kernel_options=options, **kwargs)
    return result


def _on_tree(module: torch.nn.Module, inputs: AttentionInputs, mask: TreeMask, options: Mapping[str, Any]) -> Tensor:
    assert mask.tree.kv_cache(module) is None, "waves hand keys from row to row, and FlexAttention reads no others"
    kernel_options = options.get("kernel_options") or _kernel_options(module)
    _check_backward(inputs, kernel_options)
    return flex_tree_attention(inputs.to_common_dtype(), mask, kernel_options)


flex_forward = tree_attention_or(_plain, _on_tree)
"""The [`AttentionFunction`] of `flex_attention`."""


def _kernel_options(module: Any) -> KernelOptions | None:
    """FlexAttention's own options, from the model's config."""
    options: KernelOptions | None = getattr(module.config, "kernel_options", None)
    return options


def _check_backward(inputs: AttentionInputs, kernel_options: KernelOptions | None) -> None:
    tensors = (inputs.query, inputs.key, inputs.value, inputs.sinks)
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in tensors):
        return
    device = inputs.query.device.type
    if device in _WITHOUT_BACKWARD:
        raise ValueError(
            f"PyTorch's FlexAttention cannot be trained on device '{device}': it has no backward pass there. Load the "
            "model with attn_implementation='sdpa', or train on a GPU."
        )
    if inputs.sinks is not None and (kernel_options or {}).get("BACKEND") == "FLASH":
        raise ValueError(
            "kernel_options={'BACKEND': 'FLASH'} cannot train a model with attention sinks: FlashAttention 4 has no "
            "gradient of the log-sum-exp in FlexAttention, and sinks need it. Leave BACKEND out, or load the model "
            "with attn_implementation='flash_attention_2'."
        )
