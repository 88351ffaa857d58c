"""Which of PyTorch's own kernels computes tree attention under `sdpa` and `eager`, decided before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import torch
from torch.utils._triton import has_triton

from .mask_rules import MaskRule, RuleKind


class TorchKernel(StrEnum):
    """PyTorch's kernels, fastest first."""

    VARLEN = "varlen"
    """Flash attention for CUDA over sequences of different lengths: one call for all branches."""
    FLEX = "flex"
    """FlexAttention, compiled by Triton: one call for all branches, and scores may be capped."""
    CUDA_FLASH = "cuda_flash"
    """Flash attention for CUDA, block by block; no masks."""
    CPU_FLASH = "cpu_flash"
    """Flash attention for CPU, block by block."""
    MATH = "math"
    """The formulas in plain PyTorch, block by block, in float32 at least: any device, dtype, mask and softcap."""


@dataclass(frozen=True, slots=True)
class DeviceTraits:
    """What a device and the installed PyTorch can run."""

    type: str  # `"cpu"`, `"cuda"`, or another device type of PyTorch
    capability: tuple[int, int] = (0, 0)  # compute capability of a CUDA device
    has_flash: bool = False  # whether PyTorch was built with flash attention for NVIDIA GPUs
    # Whether its varlen kernel returns log-sum-exps as `(heads, num_queries)`. Builds before FlashAttention 2.6 pad
    # them to `(num_sequences, heads, max_seqlen_q)`.
    has_packed_lse: bool = False
    has_triton: bool = False  # whether Triton is installed and compiles for the device

    @classmethod
    def from_device(cls, device: torch.device) -> DeviceTraits:
        """Return the traits of a device."""
        if device.type != "cuda" or torch.version.hip is not None:
            return cls(device.type)
        has_flash = torch.backends.cuda.is_flash_attention_available()
        return cls("cuda", torch.cuda.get_device_capability(device), has_flash, has_packed_lse(), has_triton())

    def why_no_varlen(self) -> str | None:
        """Return why PyTorch's varlen kernel cannot run here, `None` if it can."""
        if self.type != "cuda" or not self.has_flash:
            return "this build of PyTorch has none for this device"
        if self.capability < (8, 0):
            return f"this GPU has compute capability {self.capability[0]}.{self.capability[1]}, not 8.0 or more"
        return None if self.has_packed_lse else "this build of PyTorch pads its log-sum-exps"


@cache
def has_packed_lse() -> bool:
    """Return whether PyTorch's varlen kernel packs log-sum-exps, by its own description of its outputs."""
    q = torch.empty(7, 2, 8, dtype=torch.bfloat16, device="meta")
    borders = torch.empty(3, dtype=torch.int32, device="meta")
    lse = torch.ops.aten._flash_attention_forward(q, q, q, borders, borders, 4, 4, 0.0, True, False)[1]
    return tuple(lse.shape) == (2, 7)


def choose_torch_kernel(
    device: DeviceTraits,
    dtype: torch.dtype,
    head_dim: int,
    rule: MaskRule | None,
    *,
    has_softcap: bool = False,
    has_cache: bool = False,
) -> TorchKernel:
    """
    Return the fastest kernel that computes an attention layer. Sinks do not matter: they are added afterwards.

    `head_dim` is the larger one of keys and values. `rule` is `None` for one that is neither causal nor a window nor a
    chunk. With `has_cache`, some ancestors are outside the row (waves), which FlexAttention does not read here.
    """
    if device.type == "cpu":
        return TorchKernel.MATH if has_softcap else TorchKernel.CPU_FLASH
    if not _is_fast(device, dtype):
        return TorchKernel.MATH
    has_flex = device.has_triton and head_dim >= 16 and rule is not None and not has_cache
    if has_softcap:
        return TorchKernel.FLEX if has_flex else TorchKernel.MATH
    if rule is not None and rule.images and has_flex:
        return TorchKernel.FLEX  # one call for text and images, which differ in their masks
    if not _has_cuda_flash(device, -(-head_dim // 8) * 8):
        return TorchKernel.MATH
    if rule is not None and not rule.images and device.why_no_varlen() is None:
        return TorchKernel.VARLEN
    is_causal = rule is not None and rule.kind is RuleKind.CAUSAL
    return TorchKernel.CUDA_FLASH if is_causal else TorchKernel.MATH


def _is_fast(device: DeviceTraits, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and device.capability >= (8, 0) and dtype in (torch.float16, torch.bfloat16)


def _has_cuda_flash(device: DeviceTraits, head_dim: int) -> bool:
    # Limits that PyTorch's operators check with an error; the second is shared memory that backward does not find.
    if not device.has_flash or head_dim > 256:
        return False
    return not (192 < head_dim <= 224 and device.capability in {(8, 6), (8, 9), (12, 0), (12, 1)})
