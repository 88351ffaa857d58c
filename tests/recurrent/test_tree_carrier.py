"""The padding mask carries the tree through what models and checkpointing do to it."""

import numpy as np
import pytest
import torch

from support.float64_comparison import forward
from support.sample_sets import reasoning_chat
from support.tiny_models import model_of_type
from support.trainers import needs_cached_states
from trl_singlepass.attention.context import Tree
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.recurrent.layer import TreePaddingMask
from trl_singlepass.trees.rows import TreePlan


@pytest.fixture
def tree():
    subtree_end = np.array([3, 2, 3])
    return Tree(TreePlan.from_subtree_end(subtree_end), torch.tensor(subtree_end)[None], torch.tensor([[0, 1, 1]]))


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask[:, -3:],
        lambda mask: mask.clone(),
        lambda mask: mask.contiguous(),
        lambda mask: mask.detach(),
        lambda mask: mask.to(torch.float32),
    ],
)
def test_the_mask_keeps_its_tree(tree, change):
    assert change(TreePaddingMask.from_tree(tree)).tree is tree


def test_the_mask_is_taken_neither_for_padding_nor_for_all_ones(tree):
    mask = TreePaddingMask.from_tree(tree)
    assert mask.shape == (1, 3)
    assert not ((mask == 0) | (mask == 1)).any()
    assert not hasattr(mask == 0, "tree")


@needs_cached_states
@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_without_the_tree_raises(use_reentrant):
    model = model_of_type("qwen3_5_text")
    enable_tree(model)
    for handle in model._tree_handles:
        handle.remove()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    outputs, _ = forward(model, [reasoning_chat(2)])
    with pytest.raises(RuntimeError, match="is recomputed in backward, but the tree of its forward was not"):
        outputs.logits.sum().backward()
