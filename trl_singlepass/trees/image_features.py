"""
Images in trees: which feature each token shows, and which images own the features.

The images of a conversation that differ in content are numbered in the order of their first use. Image `j` has as many
features as a prompt has placeholder tokens for it, and owns the features from `offset_j` up to `offset_j + n_j - 1`;
`offset_j` counts those of the images before it. A token shows one feature (of an image) or none (text, -1).

A prompt with an image of 2 features, a word, another image of 3 features, and the first one again:

    input_ids        9  9  5  9  9  9  9  9
    image_features   0  1 -1  2  3  4  0  1

The placeholders of two images are the same token, so trees compare tokens together with their features ([`to_keys`]).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


NO_FEATURE = -1
_TOKEN_BITS = 32


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image by its content, and where its pixels can be read. Two references to the same content are equal."""

    content: str  # hash of the content
    num_features: int  # placeholder tokens in a prompt: the features that the model computes of the image
    source: Any = field(default=None, compare=False)  # where the pixels are, for whatever loads them
    # one of several in its prompt, for models that read these differently from a single one; numbered last
    in_company: bool = False


def to_keys(tokens: NDArray[np.int64], features: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Return one number per token by which trees compare tokens: `token + 2^32 · (feature + 1)`."""
    if features is None:
        return tokens
    keys: NDArray[np.int64] = tokens + (features + 1 << _TOKEN_BITS)
    return keys


def tokens_of(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the tokens of keys ([`to_keys`])."""
    tokens: NDArray[np.int64] = keys & ((1 << _TOKEN_BITS) - 1)
    return tokens


def features_of(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the feature that each token shows, by its key ([`to_keys`])."""
    features: NDArray[np.int64] = (keys >> _TOKEN_BITS) - 1
    return features


def image_of_feature(images: Sequence[ImageReference]) -> NDArray[np.int64]:
    """Return, for each feature of some images, the number of the image that owns it."""
    return np.repeat(np.arange(len(images)), [image.num_features for image in images])


def shown_numbers(features: NDArray[np.int64], sizes: Sequence[int]) -> list[int]:
    """
    Return the numbers of the images that tokens show, in their order, an image that they show twice included twice.

    Features `[0, 1, -1, 2, 3, 4, 0, 1]` of images with 2 and 3 features show the images 0, 1 and 0 again.
    """
    first_features = np.cumsum([0, *sizes[:-1]])
    starts = features[np.isin(features, first_features)] if len(sizes) else features[:0]
    numbers: list[int] = np.searchsorted(first_features, starts).tolist()
    assert sum(sizes[j] for j in numbers) == np.count_nonzero(features >= 0), "a sequence shows images as a whole"
    return numbers


def shown_images(features: NDArray[np.int64] | None, images: Sequence[ImageReference]) -> list[ImageReference]:
    """Return the images that tokens show, in the order of [`shown_numbers`]; none where images are not known."""
    if features is None or not images:
        return []
    return [images[j] for j in shown_numbers(features, [image.num_features for image in images])]


def without_unused(
    features: NDArray[np.int64], images: Sequence[ImageReference]
) -> tuple[NDArray[np.int64], tuple[ImageReference, ...]]:
    """
    Number features anew, so that only images that are used own any; return them, and the images used.

    Of images with 2, 3 and 1 features, `[2, 3, 4, -1, 5]` uses the last two and becomes `[0, 1, 2, -1, 3]`. `images`
    is empty if they are not known.
    """
    used = np.unique(features[features >= 0])
    numbers = np.append(np.searchsorted(used, features), NO_FEATURE)
    renumbered = np.where(features >= 0, numbers[: len(features)], NO_FEATURE)
    if not images:
        return renumbered, ()
    kept = np.unique(image_of_feature(images)[used])
    assert sum(images[j].num_features for j in kept) == len(used), "an image must be used whole or not at all"
    return renumbered, tuple(images[j] for j in kept)


class FeatureNumbers:
    """Numbers the features of many sets of images together, an image that stands in several sets once."""

    def __init__(self) -> None:
        self._offsets: dict[ImageReference, int] = {}
        self._total = 0

    def add(self, images: Iterable[ImageReference]) -> None:
        """Number images that have no number yet, in this order."""
        for image in images:
            if image not in self._offsets:
                self._offsets[image] = self._total
                self._total += image.num_features

    @property
    def images(self) -> tuple[ImageReference, ...]:
        """All distinct images so far, in the order of their features."""
        return tuple(self._offsets)

    def renumber(self, features: NDArray[np.int64], images: Sequence[ImageReference]) -> NDArray[np.int64]:
        """
        Return the features of a set by their common numbers.

        Sets of the images `[a, b]` and `[b, c]`, of 2 features each, have the numbers 0 to 3 and 2 to 5 together.
        Where images are not known, they are taken to differ from all others.
        """
        if not images:
            offset, self._total = self._total, self._total + int(features.max(initial=NO_FEATURE)) + 1
            return np.where(features >= 0, features + offset, NO_FEATURE)
        self.add(images)
        numbers = [self._offsets[image] + np.arange(image.num_features) for image in images]
        return np.concatenate([*numbers, [NO_FEATURE]])[features]  # -1 finds the last entry
