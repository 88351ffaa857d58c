"""Samples with images from short spellings, and the same samples with a token of its own for each part of an image."""

from hypothesis import strategies as st

from support.sample_sets import sample_sets
from trl_singlepass import Sample
from trl_singlepass.trees.image_features import ImageReference


PLACEHOLDER = 90
A, B, C = ImageReference("a", 2), ImageReference("b", 2), ImageReference("c", 3)
# No sample has these tokens otherwise.
PARTS = {A: [100, 101], B: [110, 111], C: [120, 121, 122]}


def conversation_of(turns):
    """Return samples from `(prompt, completion)` of tokens and images; the images are numbered by their first use."""
    images = tuple(dict.fromkeys(item for prompt, _ in turns for item in prompt if isinstance(item, ImageReference)))
    return [_sample(prompt, completion, images) for prompt, completion in turns]


def _sample(prompt, completion, images):
    offsets = {image: sum(other.num_features for other in images[:j]) for j, image in enumerate(images)}
    tokens, features = [], []
    for item in [*prompt, *completion]:
        size = item.num_features if isinstance(item, ImageReference) else 1
        tokens += [PLACEHOLDER] * size if isinstance(item, ImageReference) else [item]
        features += [offsets[item] + i for i in range(size)] if isinstance(item, ImageReference) else [-1]
    weights = [0.0] * (len(tokens) - len(completion)) + [1.0] * len(completion)
    length = len(tokens) - len(completion)
    return Sample(tokens, weights, length, image_features=features if images else None, images=images)


def spelled(sample):
    """Return a sample in which each part of an image is a token of its own, and nothing says that it is an image."""
    parts = [token for image in sample.images for token in PARTS[image]]
    tokens = [parts[f] if f >= 0 else int(t) for t, f in zip(sample.token_ids, _features(sample), strict=True)]
    return Sample(tokens, sample.loss_weights, sample.prompt_length)


def spelled_row_tokens(row):
    """Return the tokens of a row, each part of an image as a token of its own."""
    parts = [token for image in row.images for token in PARTS[image]]
    return [parts[f] if f >= 0 else int(t) for t, f in zip(row.input_ids, _features(row), strict=True)]


def _features(item):
    return [-1] * len(item) if item.image_features is None else item.image_features


@st.composite
def image_conversations(draw):
    """Draw the samples of a conversation, many of which share a beginning with images."""
    alphabet = {0: A, 1: B, 2: C}
    turns = []
    for sample in draw(sample_sets(max_samples=5, max_length=10)):
        items = [alphabet.get(token, token) for token in sample.token_ids.tolist()]
        turns.append((items, draw(st.lists(st.integers(3, 6), min_size=1, max_size=3))))
    return conversation_of(turns)
