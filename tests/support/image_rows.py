"""Prepared rows with images made by hand, and what a trainer needs to read them."""

from datasets import Dataset

from support.image_chats import CHATS, image_chat
from support.image_models import loader
from support.sample_sets import reasoning_chat
from trl_singlepass.data.arrow import row_features, to_table
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.data.rows import PreparedRow
from trl_singlepass.trees.image_features import ImageReference
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row


class HandMadeImages:
    """Loads the images of a family by their names."""

    def __init__(self, family, dtype):
        self.load = loader(family, dtype)

    def __call__(self, images):
        return self.load(images)

    def blank(self):
        return self([ImageReference("blank", 0)])


def image_collator(model, family):
    """Return a collator that loads a family's images in the precision of its model."""
    return DataCollatorForSinglePass(0, load_images=HandMadeImages(family, model.dtype))


def image_sample_sets(model, family):
    """Return conversations: with images, and, in every other place, of text alone."""
    sets = [image_chat(model, family, kind) for kind in CHATS]
    texts = [reasoning_chat(turns=2, vocab_size=80, seed=seed) for seed in range(len(sets))]
    return [samples for pair in zip(sets, texts, strict=True) for samples in pair]


def image_rows(sample_sets):
    """Return the dataset of rows of conversations."""
    rows = [Row.from_tree(PrefixTree.from_samples(samples)) for samples in sample_sets]
    table = to_table(list(map(PreparedRow, rows)), row_features(has_images=True))
    return Dataset(table)
