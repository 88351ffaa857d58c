"""Mask functions of transformers are recognised as rules, others are not; rules count depth."""

import numpy as np
import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)

from trl_singlepass.attention.mask_rules import MaskRule


CHUNKS = chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    ("mask_function", "rule"),
    [
        (causal_mask_function, MaskRule("causal")),
        (sliding_window_causal_mask_function(3), MaskRule("window", 3)),
        (CHUNKS, MaskRule("chunk", 3)),
        (bidirectional_mask_function, None),
        (or_masks(causal_mask_function, packed_sequence_mask_function(torch.zeros(1, 4))), None),
        (and_masks(CHUNKS, sliding_window_causal_mask_function(3)), None),
    ],
)
def test_mask_functions_are_recognised(mask_function, rule):
    assert MaskRule.from_mask_function(mask_function) == rule


@pytest.mark.parametrize(("kind", "first"), [("causal", 0), ("window", 5), ("chunk", 6)])
def test_first_depth_that_a_token_at_depth_7_attends_to(kind, first):
    rule = MaskRule.from_mask_function(
        {"causal": causal_mask_function, "window": sliding_window_causal_mask_function(3), "chunk": CHUNKS}[kind]
    )
    assert rule.first_depth(np.array([7])).tolist() == rule.first_depth(torch.tensor([7])).tolist() == [first]
