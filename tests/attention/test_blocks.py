"""Tree attention block by block equals dense attention under the same mask, in memory that is linear in tokens."""

import pytest
import torch
from hypothesis import given, settings

from support.dense_reference import dense_attention, dense_mask
from support.sample_sets import reasoning_chat, sample_sets
from support.tree_masks import (
    assert_same,
    long_branches,
    mask_of,
    on_meta,
    output_and_gradients,
    random_inputs,
    tree_of,
)
from trl_singlepass.attention.block_kernels import BlockMath, CpuFlash, CudaFlash
from trl_singlepass.attention.blocks import BlockAttention, block_tree_attention
from trl_singlepass.attention.sdpa import torch_tree_attention


KINDS = ("causal", "window", "chunk", "unbounded")


def expected(inputs, mask):
    return output_and_gradients(lambda x: dense_attention(x, dense_mask(mask)), inputs)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(samples=sample_sets(max_length=40))
def test_blocks_equal_dense_attention(kind, sinks, softcap, samples):
    mask = mask_of(tree_of([samples]), kind, 5)
    inputs = random_inputs(mask.tree, softcap=softcap, sinks=sinks)
    assert_same(output_and_gradients(lambda x: torch_tree_attention(x, mask), inputs), expected(inputs, mask))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", [CpuFlash(), BlockMath()], ids=["CpuFlash", "BlockMath"])
def test_kernels_agree_on_runs_longer_than_a_query_block(kernel, kind):
    mask = mask_of(tree_of([[*reasoning_chat(turns=3), *long_branches(600)]]), kind, 5)

    def attention(x):
        return BlockAttention.apply(x.query, x.key, x.value, x.sinks, mask, kernel, x.scale).transpose(1, 2)

    inputs = random_inputs(mask.tree, sinks=True)
    assert_same(output_and_gradients(attention, inputs), expected(inputs, mask))


@pytest.mark.parametrize("value_dim", [4, 16])
def test_values_may_be_narrower_or_wider_than_keys(value_dim):
    mask = mask_of(tree_of([reasoning_chat()]), "causal", 0)
    inputs = random_inputs(mask.tree, value_dim=value_dim)
    assert_same(output_and_gradients(lambda x: torch_tree_attention(x, mask), inputs), expected(inputs, mask))


def test_saved_memory_is_linear_in_tokens():
    def saved_bytes(length):
        mask = mask_of(tree_of([long_branches(length)]), "causal", 0)
        inputs, sizes = random_inputs(mask.tree, sinks=True, dtype=torch.float32), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            torch_tree_attention(inputs, mask)
        return sum(sizes)

    assert saved_bytes(800) == pytest.approx(2 * saved_bytes(400), rel=0.01)


def test_heads_of_any_size_reach_cuda_kernels_as_multiples_of_8(monkeypatch):
    """PyTorch pads them in `scaled_dot_product_attention`, above the operator that runs here."""
    sizes, forward = set(), CudaFlash.forward
    monkeypatch.setattr(CudaFlash, "forward", lambda self, x: sizes.add(x.query.shape[-1]) or forward(self, x))
    tree = on_meta(tree_of([reasoning_chat()]))
    inputs = on_meta(random_inputs(tree, head_dim=20, value_dim=12, dtype=torch.bfloat16))
    out = block_tree_attention(inputs, mask_of(tree, "causal", 0), CudaFlash())
    assert sizes == {24}
    assert out.shape == (1, tree.plan.length, 4, 12)
