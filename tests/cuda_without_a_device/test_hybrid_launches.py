"""Kernel launches of a gated delta net, whose scan counts as one, counted on meta tensors in the place of a GPU."""

import pytest
import torch
import transformers
from packaging.version import Version

from benchmarks.gpu_counts import scan
from support.hybrids import run_by_kernels
from support.launch_count import LaunchAndCopyCounter
from support.tree_masks import on_meta, tree_of
from trl_singlepass.attention.context import running_on
from trl_singlepass.reference.timing import conversation


pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.25"), reason="its layers launch other operators"
)

PLAIN = (29, 57)
"""Launches of a row of one sample, forward and backward."""


@pytest.fixture
def module(monkeypatch):
    """transformers' Qwen3.5, whose scan is a kernel that packs."""
    module = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", scan)
    return module


def launches(layer, length):
    x = torch.empty(1, length, layer.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    layer(hidden_states=x)  # makes the layouts, once per row
    with LaunchAndCopyCounter() as ahead:
        out = layer(hidden_states=x)
    with LaunchAndCopyCounter() as back:
        out.backward(torch.empty_like(out))
    assert ahead.copies_to_device == back.copies_to_device == 0
    # The backward pass of `x[index]`, which sorts on a GPU; `index_select` adds.
    assert not any("index_put" in name for name in back.operators)
    return ahead.launches, back.launches


@pytest.mark.parametrize(("turns", "ahead", "back"), [(2, 38, 88), (16, 59, 106), (64, 69, 114)])
def test_launches_grow_with_the_logarithm_of_the_depth_of_forks(module, turns, ahead, back, monkeypatch):
    """At most three times those of a plain row, and as `docs/performance.md` states them."""
    with torch.device("meta"):
        layer = module.Qwen3_5GatedDeltaNet(transformers.Qwen3_5TextConfig(), 0).to(torch.bfloat16).train()
    tree = on_meta(tree_of([conversation(turns, 30_000, seed=turns)]))
    plain = launches(layer, tree.plan.length)
    run_by_kernels(layer, monkeypatch)
    with running_on(tree):
        ours = launches(layer, tree.plan.length)
    assert plain == PLAIN
    assert ours == (ahead, back)
    assert all(own <= 3 * stock for own, stock in zip(ours, plain, strict=True))
