"""The measured check on a model of a test, with tokens that every vocabulary has."""

from contextlib import nullcontext

import numpy as np
import torch

from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.engine.check.checked_model import get_device
from trl_singlepass.engine.check.tree_check import TreeCheck, check_tree, tokens_of_batch
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.reference.single_pass import collator_of, make_batch
from trl_singlepass.trees.prefix_tree import PrefixTree


TEXT = np.random.default_rng(1).integers(3, 90, 200)
AUTOCAST = "autocast"
"""Parameters in float32 that compute in bfloat16, which is what `bf16=True` trains."""
PRECISIONS = [torch.float32, torch.bfloat16, AUTOCAST]


def checked(model, precision=None, text=TEXT):
    """Return what the check says of a model, in one of `PRECISIONS` if it is given; trees are enabled in it."""
    if precision is not None:
        model = model.to(torch.float32 if precision == AUTOCAST else precision)
    enable_tree(model)
    is_autocast = precision == AUTOCAST
    with torch.autocast("cpu", torch.bfloat16) if is_autocast else nullcontext():
        return TreeCheck(model, DataCollatorForSinglePass(0), None, torch.bfloat16 if is_autocast else None).run(text)


def checked_on_images(model, samples, images):
    """Return what the check says of a model on trees, with an image of some samples; `images` are `RowImages`."""
    batch = make_batch(PrefixTree.from_samples(samples), get_device(model), images)
    assert tokens_of_batch(batch)[1]
    return check_tree(model, batch, collator=collator_of(images))
