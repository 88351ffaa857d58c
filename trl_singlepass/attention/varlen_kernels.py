"""Flash kernels as `VarlenKernel`: the packages flash-attn 2 and 3, the same from the Hub, and PyTorch's own."""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

from .interface import Gradients
from .kernel_choice import DeviceTraits
from .varlen_plan import VarlenCall


aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class VarlenInputs:
    """One call of a varlen kernel."""

    query: Tensor  # (num_queries, heads, head_dim)
    key: Tensor  # (num_keys, kv_heads, head_dim)
    value: Tensor  # like `key`
    call: VarlenCall
    scale: float  # factor of the scores
    softcap: float  # of the scores, 0 for none


class VarlenKernel(ABC):
    """Flash attention over sequences of different lengths, causal and aligned at the end of the keys."""

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    """Dtypes that the kernel takes."""
    max_head_dim: ClassVar[int] = 256
    """Largest size of a head."""
    has_softcap: ClassVar[bool] = True
    """Whether the kernel has a softcap."""

    @abstractmethod
    def forward(self, x: VarlenInputs) -> tuple[Tensor, Tensor]:
        """Return the output, `(num_queries, heads, head_dim)`, and the log-sum-exp, `(heads, num_queries)`."""

    @abstractmethod
    def backward(self, grad: Tensor, x: VarlenInputs, out: Tensor, lse: Tensor, *, deterministic: bool) -> Gradients:
        """Return the gradients, from the gradient of the output and from what `forward` returned."""


class Flash2(VarlenKernel):
    """FlashAttention 2, from the package `flash-attn` or from the Hub."""

    def __init__(self, interface: ModuleType) -> None:
        self._forward = interface._flash_attn_varlen_forward
        self._backward = interface._flash_attn_varlen_backward

    def forward(self, x: VarlenInputs) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp."""
        result = _call(self._forward, q=x.query, k=x.key, v=x.value, dropout_p=0.0, **_common(x))
        return _output_and_lse(result, x.query)

    def backward(self, grad: Tensor, x: VarlenInputs, out: Tensor, lse: Tensor, *, deterministic: bool) -> Gradients:
        """Return the gradients of queries, keys and values."""
        dq, dk, dv = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x.query, x.key, x.value))
        _call(
            self._backward, dout=grad, q=x.query, k=x.key, v=x.value, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv,
            dropout_p=0.0, deterministic=deterministic, **_common(x),
        )  # fmt: skip
        return dq, dk, dv


class Flash3(Flash2):
    """FlashAttention 3, from the package `flash-attn-3` or from the Hub; one entry point for all layouts."""

    def __init__(self, interface: ModuleType) -> None:
        self._forward = interface._flash_attn_forward
        self._backward = interface._flash_attn_backward


class TorchFlash(VarlenKernel):
    """PyTorch's own flash attention for CUDA (`torch.nn.attention.varlen`): needs no package, has no softcap."""

    has_softcap: ClassVar[bool] = False

    def forward(self, x: VarlenInputs) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp."""
        result = aten._flash_attention_forward(
            x.query, x.key, x.value, *_borders(x.call), 0.0, _is_causal(x.call), False, scale=x.scale,
            **_window(x.call),
        )  # fmt: skip
        return _output_and_lse(result, x.query)

    def backward(self, grad: Tensor, x: VarlenInputs, out: Tensor, lse: Tensor, *, deterministic: bool) -> Gradients:
        """Return the gradients of queries, keys and values; `torch.use_deterministic_algorithms` fixes their order."""
        grads: Gradients = aten._flash_attention_backward(
            grad, x.query, x.key, x.value, out, lse, *_borders(x.call), 0.0, _is_causal(x.call),
            *_without_dropout(x.query.device), scale=x.scale, **_window(x.call),
        )  # fmt: skip
        return grads


@cache
def _without_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """The state of the random numbers that no dropout draws, made once per device."""
    return torch.empty(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)


@cache
def flash_kernel(implementation: str) -> VarlenKernel:
    """
    Return the kernel of an `attn_implementation`, loaded from where transformers loads it, or `"torch_varlen"`.

    Raises `ImportError` if it is not installed, or its release lacks what tree attention needs.
    """
    if implementation == "torch_varlen":
        if not torch.cuda.is_available():
            raise ImportError(f"'torch_varlen' is PyTorch's flash attention for CUDA, and there is none. {_INSTALL}")
        if reason := DeviceTraits.from_device(torch.device("cuda")).why_no_varlen():
            raise ImportError(f"'torch_varlen' is PyTorch's flash attention for CUDA, and {reason}. {_INSTALL}")
        return TorchFlash()
    try:
        (_, varlen, *_), _ = lazy_import_flash_attention(implementation)
    except (ImportError, ValueError) as error:
        raise ImportError(f"{implementation!r} could not be loaded: {error}. {_INSTALL}") from error
    interface = sys.modules[inspect.unwrap(varlen).__module__]
    if hasattr(interface, "_flash_attn_varlen_backward"):
        return Flash2(interface)
    if hasattr(interface, "_flash_attn_backward"):
        return Flash3(interface)
    raise ImportError(
        f"{implementation!r} comes from {interface.__name__}, which has neither flash-attn 2's "
        f"_flash_attn_varlen_backward nor flash-attn 3's _flash_attn_backward. {_INSTALL}"
    )


_INSTALL = (
    "Install flash-attn (2.7 or newer) for 'flash_attention_2', flash-attn-3 for 'flash_attention_3', or kernels for "
    "a kernel of the Hub such as 'kernels-community/flash-attn2'; or load the model with attn_implementation='sdpa' "
    "or 'flex_attention', which need no package."
)


def _call(function: Callable[..., Any], **arguments: Any) -> Any:
    """
    Call an entry point whose parameters differ between releases.

    Some take one `window_size` for both sides, or `is_causal` for `causal`, and some have no defaults.
    """
    parameters = inspect.signature(getattr(function, "_init_fn", function)).parameters
    arguments["window_size"] = (arguments["window_size_left"], arguments["window_size_right"])
    arguments["is_causal"] = arguments["causal"]
    required = {"softcap"} if arguments["softcap"] else set()
    if missing := required - set(parameters):
        raise ImportError(f"{function} has no {', '.join(missing)}. {_INSTALL}")
    without_default = {name: None for name, spec in parameters.items() if spec.default is inspect.Parameter.empty}
    return function(**{**without_default, **{name: arguments[name] for name in parameters if name in arguments}})


def _common(x: VarlenInputs) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    borders = dict(zip(names, _borders(x.call), strict=True))
    return {**borders, **_window(x.call), "softmax_scale": x.scale, "causal": x.call.is_causal, "softcap": x.softcap}


def _borders(call: VarlenCall) -> tuple[Tensor, Tensor, int, int]:
    return call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k


def _window(call: VarlenCall) -> dict[str, int]:
    """Flash kernels count the tokens before the query and after it, and take -1 for all."""
    return {
        "window_size_left": -1 if call.window is None else call.window - 1,
        "window_size_right": 0 if call.is_causal else -1,
    }


def _is_causal(call: VarlenCall) -> bool:
    """PyTorch's operator knows either a window or a causal mask."""
    return call.is_causal and call.window is None


def _output_and_lse(result: Sequence[Tensor], query: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = result[0], result[1]
    expected = (query.shape[1], query.shape[0])
    if tuple(lse.shape) != expected:
        raise ImportError(f"The kernel returned a log-sum-exp of shape {tuple(lse.shape)}, not {expected}. {_INSTALL}")
    return out, lse
