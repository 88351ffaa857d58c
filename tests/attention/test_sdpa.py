"""Tree attention on PyTorch's kernels equals dense attention under the same mask; what it cannot do is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, GPT2Config
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from support.float64_comparison import forward
from support.sample_sets import reasoning_chat, sample_sets
from support.tiny_families import FAMILIES, MIXTURES, tiny_model
from trl_singlepass import Sample
from trl_singlepass.attention import Tree, TreeMask
from trl_singlepass.attention.block_kernels import BlockMath, CpuFlash
from trl_singlepass.attention.blocks import BlockAttention, tree_blocks
from trl_singlepass.attention.dense import dense_attention
from trl_singlepass.attention.sdpa import tree_attention
from trl_singlepass.training.model import UnsupportedModelError, check_every_layer_attended, enable_tree
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import TreePlan


HEADS, KV_HEADS, HEAD_DIM, SCALE = 4, 2, 8, 0.3


def every_third(batch, head, query, key):
    """A rule that no transformers model has: neither causal alone nor a window."""
    return (query - key) % 3 == 0


RULES = {
    "causal": (causal_mask_function, None),
    "window": (sliding_window_causal_mask_function(5), 5),
    "chunks": (chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)), 4),
    "unknown": (and_masks(causal_mask_function, every_third), None),
}


def mask_of(samples, rule="causal"):
    tree = PrefixTree.from_samples(samples)
    plan = TreePlan.from_subtree_end(tree.subtree_end)
    subtree_end, depth = (torch.tensor(array)[None] for array in (tree.subtree_end, tree.position_ids))
    return TreeMask(Tree(plan, subtree_end, depth), *RULES[rule])


def random_inputs(length, value_dim=HEAD_DIM, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    shapes = [(HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, value_dim)]
    return [draw(1, heads, length, dim) for heads, dim in shapes], draw(HEADS)


def output_and_gradients(attention, tensors):
    out = attention()
    weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=25)
@given(samples=sample_sets(max_length=40))
def test_blocks_equal_dense_attention(rule, with_sinks, softcap, samples):
    mask = mask_of(samples, rule)
    (q, k, v), sinks = random_inputs(mask.tree.plan.length)
    sinks = sinks if with_sinks else None
    tensors = [q, k, v, *([sinks] if with_sinks else [])]
    expected = output_and_gradients(lambda: dense_attention(q, k, v, mask.dense(), SCALE, softcap, sinks), tensors)
    actual = output_and_gradients(lambda: tree_attention(q, k, v, mask, SCALE, softcap, sinks), tensors)
    assert_equal(actual, expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kernel", [CpuFlash(), BlockMath()], ids=["CpuFlash", "BlockMath"])
def test_kernels_agree_on_runs_longer_than_a_query_block(kernel, rule):
    mask = mask_of([*reasoning_chat(turns=3), *long_branches(600)], rule)
    (q, k, v), sinks = random_inputs(mask.tree.plan.length)
    expected = output_and_gradients(
        lambda: dense_attention(q, k, v, mask.dense(), SCALE, None, sinks), [q, k, v, sinks]
    )
    actual = output_and_gradients(lambda: BlockAttention.apply(q, k, v, sinks, mask, kernel, SCALE), [q, k, v, sinks])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1.0, float(b.abs().max())))


def long_branches(length):
    history = [7] * length
    return [Sample.from_prompt_and_completion(history, [first] * length) for first in (8, 9)]


@pytest.mark.parametrize("value_dim", [4, 16])
def test_values_may_be_narrower_or_wider_than_keys(value_dim):
    mask = mask_of(reasoning_chat())
    (q, k, v), _ = random_inputs(mask.tree.plan.length, value_dim)
    expected = output_and_gradients(lambda: dense_attention(q, k, v, mask.dense(), SCALE), [q, k, v])
    assert_equal(output_and_gradients(lambda: tree_attention(q, k, v, mask, SCALE), [q, k, v]), expected)


@given(samples=sample_sets(), rule=st.sampled_from(["causal", "window", "chunks"]))
def test_blocks_cover_every_visible_pair_and_no_key_twice(samples, rule):
    mask = mask_of(samples, rule)
    covered = torch.zeros_like(mask.dense()[0, 0], dtype=torch.int)
    for block in tree_blocks(mask, query_block=3):
        for first, last in block.keys:
            covered[block.start : block.end, first:last] += 1
    assert (covered <= 1).all()
    assert (covered.bool() | ~mask.dense()[0, 0]).all()


def test_saved_memory_is_linear_in_tokens():
    def saved_bytes(length):
        mask = mask_of(long_branches(length))
        (q, k, v), sinks = random_inputs(mask.tree.plan.length, dtype=torch.float32)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            tree_attention(q, k, v, mask, SCALE, None, sinks)
        return sum(sizes)

    assert saved_bytes(800) == pytest.approx(2 * saved_bytes(400), rel=0.01)


@pytest.mark.parametrize(("window", "is_causal"), [(5, False), (10_000, True)])
def test_a_window_longer_than_every_path_needs_no_mask(window, is_causal):
    tree = mask_of(reasoning_chat()).tree
    assert TreeMask(tree, sliding_window_causal_mask_function(window), window).is_causal is is_causal


def test_a_window_joined_with_another_rule_is_not_taken_for_a_plain_window():
    tree = mask_of(reasoning_chat()).tree
    rule = and_masks(sliding_window_causal_mask_function(10_000), every_third)
    assert not TreeMask(tree, rule, 10_000).is_causal


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_batches_run_as_before(family):
    """Generation and plain rows: a padded batch gives the same logits and the same tokens as the stock model."""
    # Generation with router logits fails in transformers itself.
    overrides = {"output_router_logits": False} if family in MIXTURES else {}
    model = tiny_model(family, **overrides).eval()
    input_ids = torch.randint(5, 90, (2, 12))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :4] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    kept = attention_mask.bool()
    with torch.no_grad():
        logits = model(**inputs).logits[kept]
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        enable_tree(model)
        torch.testing.assert_close(model(**inputs).logits[kept], logits, rtol=0, atol=1e-10)
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), tokens)


def test_enable_tree_names_an_unknown_implementation():
    model = tiny_model("qwen3")
    model.config._attn_implementation = "paged|eager"
    with pytest.raises(ValueError, match=r"attn_implementation='paged\|eager'.*'sdpa'"):
        enable_tree(model)


def test_switching_twice_changes_nothing():
    model = tiny_model("qwen3", attn_implementation="sdpa")
    assert enable_tree(model) == "sdpa"
    assert enable_tree(model) == model.config._attn_implementation


def test_the_saved_config_holds_no_trace_of_tree_attention(tmp_path):
    model = tiny_model("qwen3")
    enable_tree(model)
    model.save_pretrained(tmp_path)
    assert "tree" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_models_that_do_not_take_attention_from_outside_are_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM does not take its attention function"):
        enable_tree(model)


def test_attention_dropout_is_refused():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, attn_pdrop=0.1))
    enable_tree(model.train())
    with pytest.raises(ValueError, match=r"GPT2Attention asks for attention dropout 0\.1.*attention_dropout"):
        forward(model, [reasoning_chat()])


def test_a_layer_that_does_not_receive_the_tree_is_found():
    model = tiny_model("qwen3", attn_implementation="sdpa")
    enable_tree(model)
    tree = mask_of(reasoning_chat()).tree
    tree.attended_by.add(model.model.layers[0].self_attn)
    with pytest.raises(UnsupportedModelError, match="Qwen3ForCausalLM did not receive the tree in 'Qwen3Attention'"):
        check_every_layer_attended(model, tree)
    tree.attended_by.add(model.model.layers[1].self_attn)
    check_every_layer_attended(model, tree)


def test_a_row_that_does_not_fit_the_tree_is_refused():
    mask = mask_of(reasoning_chat())
    with pytest.raises(ValueError, match=r"needs depth of shape \(1, "):
        Tree(mask.tree.plan, mask.tree.subtree_end, mask.tree.depth[:, 1:])
