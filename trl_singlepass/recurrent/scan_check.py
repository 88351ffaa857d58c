"""
Compare the fast kernel of a gated delta rule with PyTorch's, once per process, before anything is trained.

With Triton from 3.4 to 3.7.0 on Hopper GPUs, the backward pass of flash-linear-attention's `chunk_gated_delta_rule` is
wrong (fla-org/flash-linear-attention, issue 640, pull requests 826 and 983). N-pass runs the same kernel, so comparing
losses and gradients with it shows nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F


Scan = Callable[..., tuple[Tensor, Tensor]]

DEVICES = ("cuda",)
"""Device types whose kernels are compared."""
NUM_TOKENS = 320  # five chunks of 64
MAX_DIFFERENCE = 0.05
"""Of a result, relative to its norm. fla's own tests allow 0.02 in bfloat16; the known error is about 0.5."""


class ScanSizes(NamedTuple):
    """Sizes of a layer's scan."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int


def check_scan(layer: nn.Module, scan: str, hidden: Tensor) -> None:
    """
    Compare the gated delta rule of a layer, a name in its module, with PyTorch's, once for its sizes and only on
    [`DEVICES`]; `hidden` is an input of the layer. Raises `RuntimeError` if the two differ.
    """
    device = hidden.device
    if device.type not in DEVICES or scan != "torch_chunk_gated_delta_rule":
        return
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
    names = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
    kernel = inspect.unwrap(type(layer).forward).__globals__[scan]
    compare_scan(kernel, ScanSizes(*(int(getattr(layer, name)) for name in names)), device, dtype)


@cache
def compare_scan(kernel: Scan, sizes: ScanSizes, device: torch.device, dtype: torch.dtype) -> None:
    """Compare a scan with the PyTorch code that it wraps; a difference above `MAX_DIFFERENCE` is a `RuntimeError`."""
    reference = inspect.unwrap(kernel)
    # Checkpointing counts the tensors that its layers save; these are not among them.
    hooks = saved_tensors_hooks(lambda x: x, lambda x: x)
    with hooks, torch.autocast(device.type, enabled=False), torch.enable_grad():
        theirs = _results(reference, sizes, device, torch.promote_types(dtype, torch.float32), dtype)
        ours = _results(kernel, sizes, device, dtype, dtype)
    for name, expected in theirs.items():
        got = ours[name].to(expected.dtype)
        difference = float((got - expected).norm() / expected.norm())
        if not difference <= MAX_DIFFERENCE:  # nor NaN
            raise RuntimeError(
                f"The gated delta rule's kernel is wrong on this machine: its {name} has norm {float(got.norm()):.4g} "
                f"where PyTorch's own code gives {float(expected.norm()):.4g}, and they differ by {difference:.2g} of "
                f"it (at most {MAX_DIFFERENCE} was expected; {_versions()}). Triton 3.4 to 3.7.0 compiles the "
                "backward pass wrongly on Hopper GPUs: install triton>=3.7.1, or uninstall flash-linear-attention."
            )


def _results(
    scan: Scan, sizes: ScanSizes, device: torch.device, dtype: torch.dtype, rounded_to: torch.dtype
) -> dict[str, Tensor]:
    """Return the output, the final state and the gradients for random inputs, which are the same for every dtype."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    per_token = (1, NUM_TOKENS, sizes.value_heads)
    query, key = (draw(1, NUM_TOKENS, sizes.key_heads, sizes.key_dim) for _ in range(2))
    value, decay, beta = draw(*per_token, sizes.value_dim), F.logsigmoid(draw(*per_token) + 2), draw(*per_token)
    state = draw(1, sizes.value_heads, sizes.key_dim, sizes.value_dim)
    inputs: dict[str, Any] = {
        "query": query.to(rounded_to).to(dtype),
        "key": key.to(rounded_to).to(dtype),
        "value": value.to(rounded_to).to(dtype),
        "g": decay,
        "beta": beta.sigmoid().to(rounded_to).to(dtype),
        "initial_state": state,
    }
    inputs = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
    query, key, value, *_ = inputs.values()
    options = {name: inputs[name] for name in ("g", "beta", "initial_state")}
    output, final = scan(query, key, value, output_final_state=True, use_qk_l2norm_in_kernel=True, **options)
    grads = [draw(*x.shape).to(x) for x in (output, final)]
    gradients = torch.autograd.grad([output, final], list(inputs.values()), grads)
    named = {f"gradient of {name}": x for name, x in zip(inputs, gradients, strict=True)}
    return {"output": output.detach(), "final state": final.detach(), **named}


def _versions() -> str:
    versions = {}
    for package in ("torch", "triton", "flash-linear-attention"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    return ", ".join(f"{package} {version}" for package, version in versions.items())
