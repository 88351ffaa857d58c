"""Which of PyTorch's kernels runs under `sdpa` and `eager`: one table, and what holds for every cell of the cube."""

import itertools

import pytest
import torch

from support.gpu_stand_in import A100, B200, H100, L4, RTX5090, T4, V100, gpu
from trl_singlepass.attention.kernel_choice import DeviceTraits, TorchKernel, choose_torch_kernel, has_packed_lse
from trl_singlepass.attention.mask_rules import MaskRule, RuleKind


CPU, MPS, ROCM = DeviceTraits("cpu"), DeviceTraits("mps"), DeviceTraits("cuda")
NO_FLASH = gpu(9, 0, has_flash=False)
NO_TRITON = gpu(9, 0, has_triton=False)
PADDED_LSE = gpu(9, 0, has_packed_lse=False)
CAUSAL, WINDOW, CHUNK = MaskRule(RuleKind.CAUSAL), MaskRule(RuleKind.WINDOW, 512), MaskRule(RuleKind.CHUNK, 8192)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SOFTCAP, CACHE = {"has_softcap": True}, {"has_cache": True}


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "rule", "needs", "kernel"),
    [
        # The rule
        (H100, BF16, 128, CAUSAL, {}, "varlen"),
        (H100, BF16, 64, WINDOW, {}, "varlen"),
        (H100, BF16, 128, CHUNK, {}, "varlen"),
        (H100, BF16, 128, None, {}, "math"),
        # The device
        (A100, BF16, 128, WINDOW, {}, "varlen"),
        (B200, BF16, 128, WINDOW, {}, "varlen"),
        (RTX5090, BF16, 128, WINDOW, {}, "varlen"),
        (T4, FP16, 128, CAUSAL, {}, "math"),
        (V100, FP16, 128, WINDOW, {}, "math"),
        (ROCM, BF16, 128, CAUSAL, {}, "math"),
        (MPS, FP16, 128, CAUSAL, {}, "math"),
        (CPU, BF16, 128, CAUSAL, {}, "cpu_flash"),
        (CPU, FP64, 128, None, {}, "cpu_flash"),
        # The build of PyTorch
        (NO_FLASH, BF16, 128, CAUSAL, {}, "math"),
        (PADDED_LSE, BF16, 128, CAUSAL, {}, "cuda_flash"),
        (PADDED_LSE, BF16, 128, WINDOW, {}, "math"),
        # The dtype
        (H100, FP16, 128, CAUSAL, {}, "varlen"),
        (H100, FP32, 128, CAUSAL, {}, "math"),
        (H100, FP64, 128, WINDOW, {}, "math"),
        # The size of heads
        (H100, BF16, 20, CAUSAL, {}, "varlen"),
        (H100, BF16, 256, CAUSAL, {}, "varlen"),
        (H100, BF16, 257, CAUSAL, {}, "math"),
        (A100, BF16, 200, CAUSAL, {}, "varlen"),
        (L4, BF16, 192, CAUSAL, {}, "varlen"),
        (L4, BF16, 193, CAUSAL, {}, "math"),
        (L4, BF16, 224, CAUSAL, {}, "math"),
        (L4, BF16, 256, CAUSAL, {}, "varlen"),
        (RTX5090, BF16, 200, CAUSAL, {}, "math"),
        # Capped scores
        (H100, BF16, 256, CAUSAL, SOFTCAP, "flex"),
        (H100, BF16, 256, WINDOW, SOFTCAP, "flex"),
        (NO_TRITON, BF16, 256, CAUSAL, SOFTCAP, "math"),
        (H100, BF16, 8, CAUSAL, SOFTCAP, "math"),
        (H100, BF16, 256, None, SOFTCAP, "math"),
        (H100, FP32, 256, CAUSAL, SOFTCAP, "math"),
        (CPU, BF16, 256, CAUSAL, SOFTCAP, "math"),
        # Ancestors outside the row
        (H100, BF16, 128, CAUSAL, CACHE, "varlen"),
        (H100, BF16, 128, WINDOW, CACHE, "varlen"),
        (PADDED_LSE, BF16, 128, CAUSAL, CACHE, "cuda_flash"),
        (H100, BF16, 256, CAUSAL, SOFTCAP | CACHE, "math"),
        (CPU, FP32, 128, WINDOW, CACHE, "cpu_flash"),
    ],
)
def test_choice(device, dtype, head_dim, rule, needs, kernel):
    assert choose_torch_kernel(device, dtype, head_dim, rule, **needs) == kernel


CUBE = list(
    itertools.product(
        [CPU, MPS, ROCM, V100, T4, A100, L4, H100, B200, RTX5090, NO_FLASH, NO_TRITON, PADDED_LSE],
        [BF16, FP16, FP32, FP64],
        [4, 8, 20, 64, 128, 193, 256, 257, 512],
        [CAUSAL, WINDOW, CHUNK, None],
        [{}, SOFTCAP, CACHE, SOFTCAP | CACHE],
    )
)


def test_no_kernel_gets_what_it_cannot_compute():
    for device, dtype, head_dim, rule, needs in CUBE:
        kernel = choose_torch_kernel(device, dtype, head_dim, rule, **needs)
        if kernel in (TorchKernel.VARLEN, TorchKernel.CUDA_FLASH):
            assert device.has_flash
            assert device.capability >= (8, 0)
            assert dtype in (BF16, FP16)
            assert head_dim <= 256
            assert not needs.get("has_softcap")
        if kernel in (TorchKernel.VARLEN, TorchKernel.FLEX):
            assert rule is not None
        if kernel is TorchKernel.FLEX:
            assert not needs.get("has_cache")
        if kernel is TorchKernel.CUDA_FLASH:
            assert rule == CAUSAL
        if kernel is TorchKernel.CPU_FLASH:
            assert device is CPU
            assert not needs.get("has_softcap")


def test_half_precision_on_current_gpus_never_loops_over_blocks():
    for device, dtype, head_dim, rule, needs in CUBE:
        is_current = device in (A100, H100, B200) and dtype in (BF16, FP16) and 16 <= head_dim <= 256
        if is_current and rule is not None and needs != SOFTCAP | CACHE:
            assert choose_torch_kernel(device, dtype, head_dim, rule, **needs) in ("varlen", "flex")


def test_traits_of_the_machine():
    assert DeviceTraits.from_device(torch.device("cpu")) == CPU
    assert has_packed_lse()  # PyTorch 2.13


def test_a_build_that_pads_log_sum_exps_is_recognised(monkeypatch):
    def padded(q, k, v, cu_q, cu_k, max_q, max_k, *args):
        return torch.empty_like(q), torch.empty(len(cu_q) - 1, q.shape[1], max_q, device=q.device)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", padded)
    assert not has_packed_lse.__wrapped__()
