"""Pixels on demand: the images of a row, decoded and processed when a batch is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..trees.image_features import ImageReference
from .encoded import EncodedImage
from .placeholders import ImagePlaceholders, placeholders_of


if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

BLANK_SIZE = (32, 32)
"""Width and height of a blank image in pixels, which processors bring to a size that they take."""
GetImages = Callable[[int], Sequence[EncodedImage]]
"""From the number of an example to its images, in the order in which its messages show them."""


class ImageLoader:
    """
    Loads and processes images that rows refer to.

    It is what a collator calls, in the worker processes of a data loader. Nothing is asked of the processor before the
    first image.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self._datasets: dict[str, GetImages] = {}

    @property
    def placeholders(self) -> ImagePlaceholders:
        """What the processor writes for images."""
        return placeholders_of(self.processor)

    def knows(self, image: ImageReference) -> bool:
        """Return whether the pixels of an image can be found."""
        return not image.source.get("dataset") or image.source["dataset"] in self._datasets

    def add_dataset(self, name: str, get_images: GetImages) -> None:
        """Make the images of a dataset known: rows refer to it by `name`; `get_images` takes an example of it."""
        self._datasets[name] = get_images

    def __call__(self, images: Sequence[ImageReference]) -> dict[str, torch.Tensor]:
        """
        Return what a model reads of images, such as `pixel_values`, in their order.

        Those that stand among others in their prompts come last. If an image cannot be read, or has changed since its
        row was prepared, a `ValueError` names the row.
        """
        loaded: list[Image] = []
        examples: dict[tuple[str, int], Sequence[EncodedImage]] = {}
        for image in images:
            if not self.knows(image):
                raise ValueError(
                    "The rows refer to images of a dataset that is not at hand. Pass its conversations in the place "
                    "of the rows: preparing them again takes no time, since it is cached."
                )
            try:
                encoded = self._find(image.source, examples)
                expansion = self.placeholders.expand(encoded.read_size(), alone=not image.in_company)
                if expansion.num_features != image.num_features:
                    raise ValueError(
                        f"An image has {expansion.num_features} placeholders, and had {image.num_features} when its "
                        "row was prepared. Keep its file, and the size to which the processor brings images."
                    )
                loaded.append(encoded.load())
            except ValueError as error:
                raise ValueError(f"{_name(image.source)}{error}") from error
        return self.placeholders.process(loaded, num_alone=sum(not image.in_company for image in images))

    def blank(self) -> dict[str, torch.Tensor]:
        """Return what a model reads of a blank image, for a row without images."""
        from PIL import Image  # here, because datasets of text do not need it

        return self.placeholders.process([Image.new("RGB", BLANK_SIZE)], num_alone=1)

    def _find(
        self, source: Mapping[str, Any], examples: dict[tuple[str, int], Sequence[EncodedImage]]
    ) -> EncodedImage:
        """Return an image; each example is read once, and remembered in `examples`."""
        if not source.get("dataset"):
            return EncodedImage(source.get("path"), source.get("bytes"))
        key = source["dataset"], source["row"]
        if key not in examples:
            examples[key] = self._datasets[source["dataset"]](source["row"])
        image: EncodedImage = examples[key][source["index"]]
        return image


@lru_cache(maxsize=8)
def image_loader_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> ImageLoader | None:
    """Return the loader of a processor, which knows all datasets that were prepared with it; `None` of a tokenizer."""
    from transformers import ProcessorMixin  # here, because it takes a while

    return ImageLoader(processing_class) if isinstance(processing_class, ProcessorMixin) else None


def _name(source: Mapping[str, Any]) -> str:
    """How an error names an image that a dataset holds."""
    return f"Row {source['row']}, image {source['index'] + 1}: " if source.get("dataset") else ""
