"""The images of one conversation: their placeholders in its prompts, and the features that its tokens show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..trees.errors import DataError
from ..trees.image_features import NO_FEATURE, FeatureNumbers, ImageReference
from .loading import EncodedImage
from .placeholders import ImagePlaceholders, Size


@dataclass(frozen=True)
class ConversationImages:
    """The images of a conversation, in the order in which its messages show them."""

    placeholders: ImagePlaceholders
    sizes: tuple[Size, ...]  # width and height of each image in pixels
    contents: tuple[str, ...]  # hash of the content of each
    sources: tuple[Mapping[str, Any], ...] = field(repr=False)  # where the pixels of each are ([`ImageLoader`])

    @classmethod
    def from_encoded(
        cls,
        images: Sequence[EncodedImage],
        placeholders: ImagePlaceholders,
        sources: Sequence[Mapping[str, Any]] | None = None,
    ) -> ConversationImages:
        """Read sizes and contents of images, not pixels; by default, sources hold them. `ValueError` if bad."""
        sizes, contents = [], []
        for number, image in enumerate(images, start=1):
            try:
                sizes.append(image.read_size())
                contents.append(image.content)
            except ValueError as error:
                raise DataError(f"Image {number} of {len(images)}: {error}") from error
        sources = sources or [{"path": image.path, "bytes": image.data} for image in images]
        return cls(placeholders, tuple(sizes), tuple(contents), tuple(sources))

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def references(self) -> tuple[ImageReference, ...]:
        """The distinct images, in the order of their features."""
        ways = (True, False) if self.placeholders.depends_on_company and len(self) > 1 else (True,)
        return tuple(dict.fromkeys(self._reference(i, alone=way) for way in ways for i in range(len(self))))

    def write(self, text: str, shown: Sequence[int]) -> str:
        """Replace each placeholder by what the processor writes for its image, whose number `shown` holds."""
        alone = len(shown) == 1
        return self.placeholders.write(text, [self.placeholders.expand(self.sizes[i], alone=alone) for i in shown])

    def features_in(self, token_ids: NDArray[np.int64], shown: Sequence[int]) -> NDArray[np.int64]:
        """Return the feature that each token of a prompt shows, counted over [`references`], -1 for text."""
        images = [self._reference(i, alone=len(shown) == 1) for i in shown]
        positions = np.flatnonzero(token_ids == self.placeholders.token_id)
        counts = [image.num_features for image in images]
        if len(positions) != sum(counts):
            raise DataError(
                f"its tokens have {len(positions)} placeholders for images, but its {len(images)} images "
                f"have {' + '.join(map(str, counts)) or 0} = {sum(counts)}. Give the images that its tokens show, in "
                "their order, and the processor that the tokens were made with"
            )
        features = np.full(len(token_ids), NO_FEATURE)
        numbers = FeatureNumbers()
        numbers.add(self.references)
        features[positions] = numbers.renumber(np.arange(len(positions)), images)
        return features

    def _reference(self, number: int, *, alone: bool) -> ImageReference:
        """One image, which is another one for the model where the processor writes it differently in company."""
        alone = alone or not self.placeholders.depends_on_company
        expansion = self.placeholders.expand(self.sizes[number], alone=alone)
        return ImageReference(self.contents[number], expansion.num_features, self.sources[number], not alone)
