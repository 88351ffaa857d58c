"""The tree of the model call in progress."""

import pytest
import torch

from support.sample_sets import reasoning_chat
from support.tree_masks import tree_of
from trl_singlepass.attention.context import Tree, current_tree, running_on


def test_a_tree_whose_tensors_do_not_fit_its_plan_is_refused():
    tree = tree_of([reasoning_chat()])
    with pytest.raises(ValueError, match=r"needs depth of shape \(1, "):
        Tree(tree.plan, tree.subtree_end, tree.depth[:, 1:])


def test_calls_outside_of_the_context_have_no_tree():
    tree = tree_of([reasoning_chat()])
    with running_on(tree):
        assert current_tree() is tree
    assert current_tree() is None


def test_a_call_that_fails_leaves_no_tree_behind():
    with pytest.raises(ZeroDivisionError), running_on(tree_of([reasoning_chat()])):
        _ = 1 / 0
    assert current_tree() is None


def test_a_tree_is_copied_to_another_device_once():
    """As with `device_map="auto"`, where the tree starts on the first GPU. The meta device stands for the second."""
    tree, device = tree_of([reasoning_chat()]), torch.device("meta")
    copy = tree.on(device)
    assert tree.on(torch.device("cpu")) is tree
    assert tree.on(device) is copy
    assert copy.subtree_end.device == copy.depth.device == device
