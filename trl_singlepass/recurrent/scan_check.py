"""
Compare the kernel of a gated delta rule with the rule itself, once per process, before anything is trained.

With Triton from 3.4 to 3.7.0 on Hopper GPUs, the backward pass of flash-linear-attention's `chunk_gated_delta_rule` is
wrong (fla-org/flash-linear-attention, issue 640, pull requests 826 and 983). N-pass runs the same kernel, so comparing
losses and gradients with it shows nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import metadata
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F


Scan = Callable[..., tuple[Tensor, Tensor]]

DEVICES = ("cuda",)
"""Device types whose kernels are compared."""
NUM_TOKENS = 320  # five chunks of 64
MAX_DIFFERENCE = 0.05
"""Of a result, relative to its norm. fla's own tests allow 0.02 in bfloat16; the known error is about 0.5."""


class WrongKernelError(RuntimeError):
    """A kernel that computes something else than PyTorch's code."""


class ScanSizes(NamedTuple):
    """Sizes of a layer's scan."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int


def check_scan(kernel: Scan, args: Sequence[Tensor], options: Mapping[str, Any]) -> None:
    """
    Compare the gated delta rule that a layer calls with the rule itself, once for its sizes and only on [`DEVICES`].

    Raises `WrongKernelError` if the two differ.
    """
    _, key, value = args
    per_dimension = options["g"].dim() != 3  # decays (Kimi)
    if key.device.type not in DEVICES or per_dimension or key.dtype == torch.float64:  # layers are measured in float64
        return
    sizes = ScanSizes(key.shape[2], value.shape[2], key.shape[3], value.shape[3])
    compare_scan(kernel, sizes, key.device, key.dtype)


def keeps_sequences_apart(kernel: Scan, args: Sequence[Tensor], options: Mapping[str, Any]) -> bool:
    """
    Whether a scan runs packed sequences (`cu_seqlens`), each from a state of its own: tried once for its sizes, on
    seven tokens.
    """
    decay, beta = options["g"], options["beta"]
    shapes = tuple(tuple(x.shape[2:]) for x in (*args, decay, beta))
    return _keeps_apart(kernel, shapes, args[0].device, args[0].dtype)


@cache
def _keeps_apart(kernel: Scan, shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> bool:
    random = torch.Generator().manual_seed(0)
    query, key, value, decay, beta = (torch.randn(1, 7, *shape, generator=random).to(device) for shape in shapes)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    own = {"g": F.logsigmoid(decay), "beta": beta.sigmoid().to(dtype)}
    settings = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    borders = torch.tensor([0, 3, 7], device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        _, state = kernel(query, key, value, **own, **settings)
        before = torch.cat([state, state + 1])
        try:
            packed = kernel(query, key, value, **own, **settings, cu_seqlens=borders, initial_state=before)
        except (AssertionError, TypeError, ValueError, RuntimeError):  # as many ways to say no as kernels
            return False
        alone = []
        for index, (start, end) in enumerate(pairwise(borders.tolist())):
            parts, options = (
                (x[:, start:end] for x in (query, key, value)),
                {k: x[:, start:end] for k, x in own.items()},
            )
            alone.append(kernel(*parts, **options, **settings, initial_state=before[index : index + 1]))
    outputs, states = zip(*alone, strict=True)
    expected = (torch.cat(outputs, 1), torch.cat(states))
    return all(
        x.shape == y.shape and float((x - y).norm()) <= MAX_DIFFERENCE * float(y.norm())
        for x, y in zip(packed, expected, strict=True)
    )


@cache
def compare_scan(kernel: Scan, sizes: ScanSizes, device: torch.device, dtype: torch.dtype) -> None:
    """Compare a scan with the rule, token by token; a difference above `MAX_DIFFERENCE` is a `WrongKernelError`."""
    # Checkpointing counts the tensors that its layers save; these are not among them.
    hooks = saved_tensors_hooks(lambda x: x, lambda x: x)
    with hooks, torch.autocast(device.type, enabled=False), torch.enable_grad():
        theirs = _results(gated_delta_rule, sizes, device, torch.promote_types(dtype, torch.float32), dtype)
        ours = _results(kernel, sizes, device, dtype, dtype)
    for name, expected in theirs.items():
        got = ours[name].to(expected.dtype)
        difference = float((got - expected).norm() / expected.norm())
        if not difference <= MAX_DIFFERENCE:  # nor NaN
            raise WrongKernelError(
                f"The gated delta rule's kernel is wrong on this machine: its {name} has norm {float(got.norm()):.4g} "
                f"where the rule itself gives {float(expected.norm()):.4g}, and they differ by {difference:.2g} of "
                f"it (at most {MAX_DIFFERENCE} was expected; {_versions()}). Triton 3.4 to 3.7.0 compiles the "
                "backward pass wrongly on Hopper GPUs: install triton>=3.7.1, or uninstall flash-linear-attention."
            )


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    """
    Return outputs, `(1, length, heads, value_dim)`, and the final state, `(1, heads, key_dim, value_dim)`.

    Source: equation 10 of arXiv 2412.06464, with normalised queries and keys.
    """
    heads = value.shape[2] // key.shape[2]
    query, key = (F.normalize(x, dim=-1, eps=1e-6).repeat_interleave(heads, dim=2) for x in (query, key))
    g, state, outputs = g.to(value.dtype), initial_state.to(value.dtype), []
    for q, k, v, decay, share in zip(*(x.unbind(1) for x in (query, key, value, g, beta)), strict=True):
        state = state * decay.exp()[..., None, None]
        missing = (v - torch.einsum("bhk,bhkv->bhv", k, state)) * share[..., None]
        state = state + k[..., None] * missing[..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q, state) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1), state


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
