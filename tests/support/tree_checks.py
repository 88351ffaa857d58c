"""The measured check on a model of a test, with tokens that every vocabulary has."""

import numpy as np

from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.engine.check.checked_model import get_device
from trl_singlepass.engine.check.tree_check import TreeCheck, check_tree, tokens_of_batch
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.reference.single_pass import collator_of, make_batch
from trl_singlepass.trees.prefix_tree import PrefixTree


TEXT = np.random.default_rng(1).integers(3, 90, 200)


def checked(model):
    """Return what the check says of a model; trees are enabled in it."""
    enable_tree(model)
    return TreeCheck(model, DataCollatorForSinglePass(0)).run(TEXT)


def checked_on_images(model, samples, images):
    """Return what the check says of a model on trees, with an image of some samples; `images` are `RowImages`."""
    batch = make_batch(PrefixTree.from_samples(samples), get_device(model), images)
    assert tokens_of_batch(batch)[1]
    return check_tree(model, batch, collator=collator_of(images))
