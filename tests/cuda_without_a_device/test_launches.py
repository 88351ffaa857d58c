"""Kernel launches and copies of tree attention, per layer and step, counted on meta tensors in the place of a GPU."""

import pytest
import torch

from support.gpu_stand_in import H100
from support.launch_count import LaunchAndCopyCounter, launches_of_a_step
from support.tree_masks import mask_of, on_meta, random_inputs, tree_of
from trl_singlepass.attention.block_kernels import CudaFlash
from trl_singlepass.attention.block_mask import build_block_mask
from trl_singlepass.attention.blocks import block_tree_attention
from trl_singlepass.attention.kernel_choice import DeviceTraits
from trl_singlepass.attention.sdpa import torch_tree_attention
from trl_singlepass.attention.varlen_plan import varlen_calls
from trl_singlepass.reference.random_conversations import conversation


MOST_LAUNCHES = 46
"""Of a layer in a step: forward, recomputation and backward."""
MOST_LAUNCHES_PER_FURTHER_CALL = 22
"""Where many branches share a long history, so that their keys are gathered in parts."""


@pytest.fixture
def _h100(monkeypatch):
    """Meta tensors are taken for tensors of an H100."""
    monkeypatch.setattr(DeviceTraits, "from_device", classmethod(lambda cls, device: H100))


def row(turns):
    return on_meta(tree_of([conversation(turns, 30_000, seed=turns)]))


def inputs_of(tree, dtype=torch.bfloat16, **options):
    return on_meta(random_inputs(tree, heads=16, kv_heads=8, head_dim=64, dtype=dtype, **options))


@pytest.mark.usefixtures("_h100")
@pytest.mark.parametrize("turns", [2, 16, 64])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("kind", "size"), [("causal", 0), ("window", 512), ("chunk", 1024)])
def test_launches_of_sdpa_in_half_precision(kind, size, sinks, turns):
    mask = mask_of(row(turns), kind, size)
    further_calls = len(mask.build_once(varlen_calls)) - 1
    inputs = inputs_of(mask.tree, sinks=sinks)
    launches = launches_of_a_step(lambda: torch_tree_attention(inputs, mask))
    assert launches <= MOST_LAUNCHES + MOST_LAUNCHES_PER_FURTHER_CALL * further_calls
    assert further_calls == 0 or (kind == "causal" and turns > 16)
    assert further_calls <= 2


@pytest.mark.usefixtures("_h100")
@pytest.mark.parametrize(("kind", "size", "stated"), [("causal", 0, 13_800), ("window", 512, 11_100)])
def test_launches_of_the_block_path_are_as_stated(kind, size, stated):
    """Float32, which no flash kernel takes: `docs/kernels.md` says what that costs."""
    mask = mask_of(row(16), kind, size)
    launches = launches_of_a_step(lambda: torch_tree_attention(inputs_of(mask.tree, torch.float32), mask))
    assert 0.9 * stated <= launches <= stated


def test_launches_of_waves_are_as_stated():
    """Their ancestors lie in a cache, which no varlen call reads: flash attention block by block."""
    mask = mask_of(row(16), "causal", 0)
    launches = launches_of_a_step(lambda: block_tree_attention(inputs_of(mask.tree), mask, CudaFlash()))
    assert 700 <= launches <= 780


@pytest.mark.parametrize(("build", "most"), [(varlen_calls, 1), (lambda mask: build_block_mask(mask, (128, 128)), 2)])
@pytest.mark.parametrize(("kind", "size"), [("causal", 0), ("window", 512)])
def test_copies_to_the_device_per_mask_type_and_row(kind, size, build, most):
    """Operators that wait for a device (`item`, `nonzero`, masks as indices) fail on meta tensors by themselves."""
    mask = mask_of(row(64), kind, size)
    with LaunchAndCopyCounter() as count:
        build(mask)
    assert count.copies_to_device <= most
