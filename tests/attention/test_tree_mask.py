"""Masks on trees: which are plain causal on this tree, and what is built once for all layers of a type."""

import pytest
from transformers.masking_utils import and_masks, sliding_window_causal_mask_function

from support.sample_sets import reasoning_chat
from support.tree_masks import mask_of, odd_depths_see_even_depths, tree_of
from trl_singlepass.attention import TreeMask


@pytest.mark.parametrize(("window", "is_causal"), [(5, False), (10_000, True)])
def test_a_window_longer_than_every_path_needs_no_mask(window, is_causal):
    tree = tree_of([reasoning_chat()])
    assert TreeMask(tree, sliding_window_causal_mask_function(window), window).is_causal is is_causal


def test_a_window_joined_with_another_rule_is_not_taken_for_a_plain_window():
    tree = tree_of([reasoning_chat()])
    rule = and_masks(sliding_window_causal_mask_function(10_000), odd_depths_see_even_depths)
    assert not TreeMask(tree, rule, 10_000).is_causal


def test_layers_share_what_is_built_for_a_mask():
    mask, built = mask_of(tree_of([reasoning_chat()]), "causal", 0), []

    def build(mask, size):
        built.append(size)
        return [size]

    assert mask.build_once(build, 3) is mask.build_once(build, 3)
    assert mask.build_once(build, 4) == [4]
    assert built == [3, 4]
