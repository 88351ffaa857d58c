"""Images as datasets hold them: sizes are read without pixels, pixels when a batch is made."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..trees.errors import DataError
from ..trees.image_features import ImageReference
from .placeholders import ImagePlaceholders, placeholders_of


if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


_ORIENTATION = 0x0112  # EXIF tag
_TURNED = (5, 6, 7, 8)  # its values for images that lie on their side
_SHORTEST_BASE64 = 64  # characters: no image file is as small
_FORMS = "Expected an image, its bytes, a path, a URL, base64, or an object with 'bytes' or 'path'"


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image that is not decoded."""

    path: str | None = None  # path or URL of its file
    data: bytes | None = None  # the file itself; takes precedence

    @classmethod
    def from_value(cls, value: Any) -> EncodedImage:
        """
        Read an image in any of the forms in which datasets and messages hold one; others are a `ValueError`.

        These are a `PIL.Image.Image`, an array, bytes, a path or URL, base64 with or without the head of a data URL,
        and a mapping with `bytes` or `path`, as of [`~datasets.Image`]. An image without a file is encoded losslessly.
        """
        if isinstance(value, str):
            data = _from_base64(value)
            return cls(data=data) if data is not None else cls(path=value)
        if value is None or isinstance(value, bool | int | float):
            raise DataError(f"{_FORMS}, got {value!r}.")
        from datasets import Image  # here, because it takes a while

        try:
            encoded: Mapping[str, Any] = Image().encode_example(value)
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{_FORMS}, got {type(value).__name__} ({error}).") from error
        return cls(encoded.get("path"), encoded.get("bytes"))

    @property
    def content(self) -> str:
        """Hash of the content: of the bytes, or of path, size and time of change of a file."""
        if self.data is not None:
            return sha256(self.data).hexdigest()[:32]
        file = Path(self.path or "")
        stamp = f"{file.stat().st_size} {file.stat().st_mtime_ns}" if file.is_file() else ""
        return sha256(f"{self.path} {stamp}".encode()).hexdigest()[:32]

    def read_size(self) -> tuple[int, int]:
        """Return width and height in pixels, as shown, from the head of the file; `ValueError` if it is no image."""
        from PIL import Image

        try:
            with self._open() as file, Image.open(file) as image:
                width, height = image.size
                turned = _has_exif(image, file) and image.getexif().get(_ORIENTATION) in _TURNED
        except Exception as error:  # file systems and decoders raise many kinds
            raise self._unreadable(error) from error
        return (height, width) if turned else (width, height)

    def load(self) -> Image:
        """Return the image, decoded and turned upright; a file that is no image is a `ValueError`."""
        from datasets import Image as ImageFeature

        try:
            image: Image = ImageFeature().decode_example({"path": self.path, "bytes": self.data})
        except Exception as error:  # file systems and decoders raise many kinds
            raise self._unreadable(error) from error
        return image

    def _open(self) -> BinaryIO:
        if self.data is not None:
            return BytesIO(self.data)
        from datasets.utils.file_utils import xopen  # a path may be a URL

        file: BinaryIO = xopen(self.path, "rb")
        return file

    def _unreadable(self, error: Exception) -> DataError:
        what = f"{len(self.data)} bytes" if self.data is not None else repr(self.path)
        return DataError(f"An image cannot be read ({what}: {error}). Repair it, or leave the row out.")


def _has_exif(image: Image, file: BinaryIO) -> bool:
    """Whether an image may have EXIF tags; Pillow would decode a PNG to look for them behind its pixels."""
    if image.format != "PNG":
        return True
    file.seek(0)
    content = file.read()
    return b"eXIf" in content or b"Raw profile type exif" in content


def _from_base64(text: str) -> bytes | None:
    """Return the bytes that a data URL or base64 of an image file holds, `None` if the text is a path."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    elif "://" in text[:16] or len(text) < _SHORTEST_BASE64 or (len(text) < 256 and Path(text).is_file()):
        return None
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


BLANK_SIZE = (32, 32)
"""Width and height of a blank image in pixels, which processors bring to a size that they take."""
GetImages = Callable[[int], Sequence[EncodedImage]]
"""From the number of an example to its images, in the order in which its messages show them."""


class ImageLoader:
    """Loads and processes images that rows refer to, in the worker processes of a data loader, for a collator."""

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
        Return what a model reads of images, such as `pixel_values`; those that stand among others come last.

        If an image cannot be read, or has changed since its row was prepared, a `ValueError` names the row.
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
                source = image.source
                place = f"Row {source['row']}, image {source['index'] + 1}: " if source.get("dataset") else ""
                raise ValueError(f"{place}{error}") from error
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
