"""
On a GPU in bfloat16: every kernel × rule × length × head size × group, against N-pass in float64.

The error of the output and of each gradient is at most twice that of N-pass in bfloat16.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from support.gpu_or_cpu import DEVICE, needs_device, on_device
from support.npass_attention import branches_of, npass_output_and_gradients, random_layer
from support.tree_masks import mask_of
from support.varlen_reference import ReferenceKernel
from trl_singlepass.attention import flex
from trl_singlepass.attention.flex import flex_tree_attention
from trl_singlepass.attention.sdpa import torch_tree_attention
from trl_singlepass.attention.varlen import varlen_tree_attention
from trl_singlepass.attention.varlen_kernels import flash_kernel
from trl_singlepass.attention.varlen_plan import varlen_plan


pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")  # on the CPU
# The last one is what transformers runs for gpt-oss under "flash_attention_2".
HUB_KERNELS = [f"kernels-community/{name}" for name in ("flash-attn2", "flash-attn3", "vllm-flash-attn3")]
KERNELS = ["sdpa", "torch_varlen", "flash_attention_2", "flash_attention_3", *HUB_KERNELS, "flex_attention"]
# Kind and size of the rule, softcap, sinks.
RULES = {
    "causal": ("causal", 0, None, False),
    "window": ("window", 128, None, False),
    "short window": ("window", 9, None, False),
    "chunk": ("chunk", 64, None, False),
    "softcap": ("causal", 0, 50.0, False),
    "sinks": ("window", 32, None, True),
}
TURNS = {40: 2, 101: 3, 161: 4, 4_000: 16, 32_000: 16}
ON_CPU = {4_000: 400, 32_000: 800}
HEAD_DIMS, GROUPS = [64, 128, 256], [1, 2, 4, 8]
# Each rule on each length; sizes of heads, and numbers of query heads for each key-value head, take turns.
CASES = [
    (rule, length, HEAD_DIMS[(2 * index + place) % 3], GROUPS[(index + place) % 4])
    for index, rule in enumerate(RULES)
    for place, length in enumerate(TURNS)
]


class InFloat32(ReferenceKernel):
    """In the place of a flash kernel on the CPU, and like one: half precision goes in and comes out."""

    def forward(self, x):
        out, lse = super().forward(in_float32(x))
        return out.to(x.query.dtype), lse

    def backward(self, grad, x, out, lse, *, deterministic):
        grads = super().backward(grad.float(), in_float32(x), out.float(), lse, deterministic=deterministic)
        return tuple(part.to(x.query.dtype) for part in grads)


def in_float32(x):
    return replace(x, query=x.query.float(), key=x.key.float(), value=x.value.float())


@pytest.fixture
def attention(request, monkeypatch):
    """A kernel by name, as a function of inputs and mask."""
    name = request.param
    if name == "sdpa":
        return torch_tree_attention
    if name == "flex_attention":
        if DEVICE == "cpu":  # which trains where PyTorch's code runs op by op
            monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
            monkeypatch.setattr(flex, "compiled_flex_attention", lambda: torch_flex.flex_attention)
        return flex_tree_attention
    try:
        kernel = InFloat32() if DEVICE == "cpu" else flash_kernel(name)
    except ImportError as error:
        pytest.skip(str(error))
    return lambda inputs, mask: varlen_tree_attention(inputs, mask, kernel)


def check(attention, branches, rule, head_dim, groups, device=DEVICE, kv_heads=2):
    kind, size, softcap, sinks = rule
    shape = (groups * kv_heads, kv_heads, head_dim)
    exact, npass = (
        npass_output_and_gradients(on_device(inputs, device), branches, kind, size, grad.to(device))
        for inputs, grad in (
            random_layer(branches, *shape, dtype, softcap, sinks) for dtype in (torch.float64, torch.bfloat16)
        )
    )
    inputs, grad = random_layer(branches, *shape, torch.bfloat16, softcap, sinks)
    inputs = on_device(inputs, device)
    out = attention(inputs, mask_of(on_device(branches.tree, device), kind, size))
    tensors = [inputs.query, inputs.key, inputs.value, *([] if inputs.sinks is None else [inputs.sinks])]
    ours = [out.detach(), *torch.autograd.grad(out, tensors, grad.to(device))]
    names = ("output", "query", "key", "value", "sinks")
    for name, own, stock, right in zip(names, ours, npass, exact, strict=False):
        # A sink's gradient is one number per head: the error of one can be small by chance.
        chance = 2**-7 * float(right.norm()) if name == "sinks" else 0.0
        error, allowed = float((own.double() - right).norm()), 2 * float((stock - right).norm()) + chance
        assert error <= allowed, name


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize(("rule", "length", "head_dim", "groups"), CASES)
@pytest.mark.parametrize("attention", KERNELS, indirect=True)
def test_error_is_at_most_twice_that_of_npass(attention, rule, length, head_dim, groups, request):
    if rule == "softcap" and "torch_varlen" in request.node.callspec.id:
        pytest.skip("refused: the kernel has no softcap")
    turns = TURNS[length]
    length = ON_CPU.get(length, length) if DEVICE == "cpu" else length
    check(attention, branches_of(length, turns), RULES[rule], head_dim, groups)


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("head_dim", [20, 72, 80, 96, 160, 192])
@pytest.mark.parametrize("attention", KERNELS, indirect=True)
def test_other_head_sizes(attention, head_dim):
    """Padded to a multiple of 8, and by the kernels to the next size that they are compiled for."""
    check(attention, branches_of(161, 4), RULES["causal"], head_dim, 2)


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kind", ["causal", "window"])
@pytest.mark.parametrize("attention", [name for name in KERNELS if name != "flex_attention"], indirect=True)
def test_many_branches_of_a_long_history(attention, kind, sinks):
    """What branches share is gathered once, for a second call; keys in windows are gathered in parts."""
    length = 640 if DEVICE == "cpu" else 6_400
    branches, size = branches_of(length, 64, history_share=0.5), length // 3
    passes = varlen_plan(mask_of(branches.tree, kind, size), 2).passes
    assert passes[0].shared is not None if kind == "causal" else len(passes) > 1
    check(attention, branches, (kind, size, None, sinks), 128, 2)


@pytest.mark.parametrize("rule", RULES)
def test_the_same_comparison_on_cpu(rule):
    check(torch_tree_attention, branches_of(101, 3), RULES[rule], 64, 2, "cpu")


def test_a_wrong_rule_is_noticed():
    def causal_only(inputs, mask):
        return torch_tree_attention(inputs, mask_of(mask.tree, "causal", 0))

    with pytest.raises(AssertionError, match="output"):
        check(causal_only, branches_of(101, 3), RULES["short window"], 64, 2, "cpu")
