"""Varlen tree attention keeps no more for backward than its inputs and outputs."""

import torch

from support.sample_sets import reasoning_chat
from support.tree_masks import mask_of, random_inputs, tree_of
from support.varlen_reference import ReferenceKernel
from trl_singlepass.attention.varlen import varlen_tree_attention
from trl_singlepass.attention.varlen_plan import varlen_plan


def test_gathered_keys_are_not_kept_for_backward():
    mask, saved = mask_of(tree_of([reasoning_chat(8)]), "causal", 0), []
    inputs = random_inputs(mask.tree)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        varlen_tree_attention(inputs, mask, ReferenceKernel())
    assert len(varlen_plan(mask).passes[0].key_index) > 2 * mask.tree.plan.length
    assert max(x.numel() for x in saved) <= inputs.query.numel()
