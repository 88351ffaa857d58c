"""The measured check on a model of a test, with tokens that every vocabulary has."""

import numpy as np

from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.engine.check import TreeCheck
from trl_singlepass.engine.enable import enable_tree


TEXT = np.random.default_rng(1).integers(3, 90, 200)


def checked(model):
    """Return what the check says of a model; trees are enabled in it."""
    enable_tree(model)
    return TreeCheck(model, DataCollatorForSinglePass(0)).run(TEXT)
