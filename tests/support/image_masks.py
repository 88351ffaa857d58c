"""Trees with images whose tokens see each other: where images may lie, and the mask that transformers gives a path."""

from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import strategies as st
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from support.sample_sets import sample_sets
from support.tree_masks import tree_of
from trl_singlepass.attention.tree_mask import TreeMask


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
def image_masks(draw, max_length=24):
    """Draw a row of trees with images anywhere but across a fork, and a mask on it."""
    sets = draw(st.lists(sample_sets(max_samples=5, max_length=max_length), min_size=1, max_size=2))
    tree = draw(with_images(tree_of(sets)))
    return image_mask(tree, draw(st.sampled_from(list(IMAGE_KINDS))), draw(st.integers(1, 9)))


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
