"""Images whose tokens see each other: each path of the tree has the mask that transformers gives it."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from support.dense_reference import dense_attention
from support.sample_sets import reasoning_chat, sample_sets
from support.tree_masks import assert_same, long_branches, output_and_gradients, random_inputs, row_of_ten, tree_of
from trl_singlepass.attention.block_kernels import BlockMath, CpuFlash
from trl_singlepass.attention.block_mask import build_block_mask, build_mask_mod
from trl_singlepass.attention.blocks import BlockAttention
from trl_singlepass.attention.mask_rules import MaskRule
from trl_singlepass.attention.sdpa import torch_tree_attention
from trl_singlepass.attention.tree_mask import TreeMask
from trl_singlepass.attention.varlen_plan import varlen_plan
from trl_singlepass.trees.rows import Run


IMAGE_KINDS = {
    "causal": lambda overlay, size: or_masks(causal_mask_function, overlay),
    # Gemma 3 and 4: the window limits images too.
    "local window": lambda overlay, size: and_masks(
        or_masks(causal_mask_function, overlay), sliding_window_overlay(size)
    ),
    # Gemma 4 Unified: it does not.
    "whole window": lambda overlay, size: or_masks(sliding_window_causal_mask_function(size), overlay),
}


def image_mask(tree, kind, size):
    """Return the `TreeMask` of a kind; its function knows nothing of the row, so that only the plan can tell."""
    nowhere = torch.full((1, tree.plan.length), -1)
    return TreeMask(tree, IMAGE_KINDS[kind](blockwise_overlay(nowhere), size))


@st.composite
def with_images(draw, tree):
    """Draw images for a tree: any range between two forks that has a token of text before it."""
    plan = tree.plan
    forks = {run.prefix[-1][1] for run in plan.runs if run.prefix}
    images = []
    for run in plan.runs:
        borders = sorted({run.start, run.end, *(fork for fork in forks if run.start < fork < run.end)})
        for start, end in pairwise(borders):
            if end - start >= 2 and draw(st.booleans()):
                first = draw(st.integers(start + 1, end - 1))
                images.append((first, draw(st.integers(first + 1, end))))
    return replace(tree, plan=replace(plan, images=tuple(images)))


def dense_image_mask(mask, kind, size):
    """Return the whole mask of a row: on each path, what transformers computes for that path as a sequence."""
    length = mask.tree.plan.length
    shows = torch.zeros(length, dtype=torch.long)
    for first, last in mask.tree.plan.images:
        shows[first:last] = 1
    end, position = mask.tree.subtree_end[0], torch.arange(length)
    visible = torch.zeros(length, length, dtype=torch.bool)
    for leaf in position[end == position + 1]:
        path = position[(position <= leaf) & (leaf < end)]
        overlay = blockwise_overlay(get_block_sequence_ids_for_mask(shows[path][None]))
        index = torch.arange(len(path))
        zero = torch.zeros((), dtype=torch.long)
        on_path = IMAGE_KINDS[kind](overlay, size)(zero, zero, index[:, None], index[None, :])
        visible[path[:, None], path[None, :]] = on_path
    return visible


NOWHERE = blockwise_overlay(torch.full((1, 9), -1))
ROW_SETS = st.lists(sample_sets(max_samples=5, max_length=24), min_size=1, max_size=2)


def expected(inputs, mask, kind, size):
    visible = dense_image_mask(mask, kind, size)
    return output_and_gradients(lambda x: dense_attention(x, visible), inputs)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("causal", MaskRule("causal", 0, "whole")),
        ("local window", MaskRule("window", 3, "local")),
        ("whole window", MaskRule("window", 3, "whole")),
    ],
)
def test_mask_functions_of_images_are_recognised(kind, rule):
    assert MaskRule.from_mask_function(IMAGE_KINDS[kind](NOWHERE, 3)) == rule


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", IMAGE_KINDS)
@settings(max_examples=15)
@given(data=st.data())
def test_blocks_equal_dense_attention(kind, softcap, data):
    tree = data.draw(with_images(tree_of(data.draw(ROW_SETS))))
    size = data.draw(st.integers(1, 9))
    mask, inputs = image_mask(tree, kind, size), random_inputs(tree, softcap=softcap, sinks=True)
    assert_same(
        output_and_gradients(lambda x: torch_tree_attention(x, mask), inputs), expected(inputs, mask, kind, size)
    )


@pytest.mark.parametrize("kind", IMAGE_KINDS)
@pytest.mark.parametrize("kernel", [CpuFlash(), BlockMath()], ids=["CpuFlash", "BlockMath"])
def test_an_image_longer_than_a_query_block(kernel, kind):
    tree = tree_of([[*reasoning_chat(turns=3), *long_branches(300)]])
    branch = max(tree.plan.runs, key=lambda run: run.end - run.start)
    tree = replace(tree, plan=replace(tree.plan, images=((branch.start + 7, branch.start + 290),)))
    mask = image_mask(tree, kind, 70)

    def attention(x):
        return BlockAttention.apply(x.query, x.key, x.value, x.sinks, mask, kernel, x.scale).transpose(1, 2)

    inputs = random_inputs(tree)
    assert_same(output_and_gradients(attention, inputs), expected(inputs, mask, kind, 70))


@pytest.mark.parametrize("kind", IMAGE_KINDS)
@settings(max_examples=25)
@given(data=st.data(), block_size=st.sampled_from([(4, 4), (8, 4), (4, 8), (128, 128)]))
def test_block_mask_equals_the_dense_mask(kind, data, block_size):
    tree = data.draw(with_images(tree_of(data.draw(ROW_SETS))))
    size = data.draw(st.integers(1, 9))
    mask = image_mask(tree, kind, size)
    dense, result = dense_image_mask(mask, kind, size), build_block_mask(mask, block_size)
    position = torch.arange(len(dense))
    assert torch.equal(build_mask_mod(mask)(0, 0, position[:, None], position[None, :]), dense)
    full = result.to_dense()[0, 0].bool()  # blocks that are computed at all
    padded = torch.zeros(full.shape[0] * block_size[0], full.shape[1] * block_size[1], dtype=torch.bool)
    padded[: len(dense), : len(dense)] = dense
    blocks = padded.view(full.shape[0], block_size[0], full.shape[1], block_size[1])
    assert torch.equal(full, blocks.any(3).any(1))
    for row, (count, columns) in enumerate(
        zip(result.full_kv_num_blocks[0, 0].tolist(), result.full_kv_indices[0, 0].tolist(), strict=True)
    ):
        for column in columns[:count]:  # rows past the end of the sequence are nobody's
            queries = min(block_size[0], len(dense) - row * block_size[0])
            assert blocks[row, :queries, column].all()


def test_an_image_becomes_a_run_of_its_own():
    plan = replace(row_of_ten().plan, images=((1, 2), (5, 7), (8, 10))).with_image_runs()
    assert plan.runs == (
        Run(0, 1, 0, ()),
        Run(1, 2, 1, ((0, 1),), is_image=True),
        Run(2, 5, 2, ((0, 2),)),
        Run(5, 7, 5, ((0, 5),), is_image=True),
        Run(7, 8, 3, ((0, 3),)),
        Run(8, 10, 4, ((0, 3), (7, 8)), is_image=True),
    )
    assert np.array_equal(plan.depths(), row_of_ten().plan.depths())


def test_images_are_found_by_run():
    shows = np.array([False, True, True, True, False, True, True, True, False, True])
    assert row_of_ten().plan.with_images(shows).images == ((1, 4), (5, 7), (7, 8), (9, 10))


@pytest.mark.parametrize("images", [((1, 4),), ((1, 3), (7, 9))], ids=["inside", "right behind"])
def test_a_shared_image_that_one_branch_continues_is_refused(images):
    tree = replace(row_of_ten(), plan=replace(row_of_ten().plan, images=images))
    with pytest.raises(ValueError, match="Put text between images"):
        _ = image_mask(tree, "causal", 0).plan


def test_text_alone_is_plain_causal():
    mask = image_mask(row_of_ten(), "causal", 0)
    assert mask.rule == MaskRule("causal")
    assert mask.plan is mask.tree.plan


def test_varlen_kernels_refuse_images_by_name():
    tree = replace(row_of_ten(), plan=replace(row_of_ten().plan, images=((4, 6),)))
    with pytest.raises(ValueError, match="tokens of an image see each other in both directions"):
        varlen_plan(image_mask(tree, "causal", 0))


@pytest.mark.parametrize(
    "rule",
    [
        or_masks(causal_mask_function, packed_sequence_mask_function(torch.zeros(1, 10))),
        or_masks(causal_mask_function, or_masks(NOWHERE, NOWHERE)),
    ],
)
def test_unknown_rules_that_look_up_positions_are_refused(rule):
    with pytest.raises(ValueError, match="looks tokens up by their position in a sequence"):
        TreeMask(row_of_ten(), rule)
