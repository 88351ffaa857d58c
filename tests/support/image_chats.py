"""Conversations with images: what templates, agents and users do to images in a history; as samples and as rows."""

from datasets import Dataset

from support.image_models import loader, references
from support.image_samples import conversation_of
from support.sample_sets import reasoning_chat
from trl_singlepass.data.arrow import row_features, to_table
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.data.rows import PreparedRow
from trl_singlepass.trees.image_features import ImageReference
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row


START, END = 91, 92


def image_chat(model, kind):
    """Return the samples of a kind of conversation; the model says how many features its images have."""
    small, other, wide, last = references(model, "small", "other", "wide", "last")
    return conversation_of(CHATS[kind](*([START, image, END] for image in (small, other, wide, last))))


def _reasoning(small, other, wide, last):
    """Images of the system, the user and a tool; two in a message; one that comes twice; reasoning is dropped."""
    system, user = [3, *other, 4], [5, *small, 6, *wide, 7]
    tool = [8, *last, 9]
    again = [5, *small, 11]
    turns = [([20, 21, 22, 23], [24, 25]), ([30, 31, 32], [33, 34, 35]), ([40, 41], [42, 43])]
    history, samples = [*system, *user], []
    for (reasoning, answer), message in zip(turns, (tool, again, []), strict=True):
        samples.append((history, reasoning + answer))
        history = [*history, *answer, *message]
    return samples


def _siblings(small, other, wide, last):
    """Two turns whose prompts differ in nothing but an image of the same size."""
    return [([3, 4, *small, 5, 6], [10, 11, 12]), ([3, 4, *other, 5, 6], [10, 13, 14])]


def _window(small, other, wide, last):
    """A history that keeps the two last screens: every screen moves, and none stays with the same tokens before it."""
    screens, answers = [small, wide, other, last], [[20, 21], [22, 23], [24, 25], [26, 27]]
    samples = []
    for turn in range(len(screens)):
        history = [3]
        for earlier in range(turn + 1):
            history += [5, *(screens[earlier] if turn - earlier < 2 else [17])]
            history += answers[earlier] if earlier < turn else [6]
        samples.append((history, [7, *answers[turn]]))
    return samples


def _text_beside_images(small, other, wide, last):
    """A turn without an image, and one whose image comes at the end of a shared prompt."""
    return [([3, 4, 5], [10, 11, 12]), ([3, 4, 5, *wide, 6], [10, 11]), ([3, 4, 5, *wide, 6, 10, 7], [13, 14])]


CHATS = {
    "reasoning": _reasoning,
    "siblings": _siblings,
    "window": _window,
    "text beside images": _text_beside_images,
}


class HandMadeImages:
    """Loads the images of a model by their names."""

    def __init__(self, model):
        self.load = loader(model)

    def __call__(self, images):
        return self.load(images)

    def blank(self):
        return self([ImageReference("blank", 0)])


def image_collator(model):
    """Return a collator that loads a model's images."""
    return DataCollatorForSinglePass(0, load_images=HandMadeImages(model))


def image_sample_sets(model):
    """Return conversations: with images, and, in every other place, of text alone."""
    sets = [image_chat(model, kind) for kind in CHATS]
    texts = [reasoning_chat(turns=2, vocab_size=80, seed=seed) for seed in range(len(sets))]
    return [samples for pair in zip(sets, texts, strict=True) for samples in pair]


def image_rows(sample_sets):
    """Return the dataset of rows of conversations."""
    rows = [Row.from_tree(PrefixTree.from_samples(samples)) for samples in sample_sets]
    table = to_table(list(map(PreparedRow, rows)), row_features(has_images=True))
    return Dataset(table)
