"""An image as a dataset holds it: encoded bytes, or the path of a file. Its size is read without its pixels."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..trees.errors import DataError


if TYPE_CHECKING:
    from PIL.Image import Image

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
        Read an image in any of the forms in which datasets and messages hold one.

        These are a `PIL.Image.Image`, an array, bytes, a path or URL, base64 with or without the head of a data URL,
        and what [`~datasets.Image`] makes of one: a mapping with `bytes` or `path`. An image without a file is encoded
        without loss. Anything else is a `ValueError`.
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
        """
        Return width and height in pixels, as the image is shown, from the head of its file. A file that cannot be
        read, or is no image, is a `ValueError`.
        """
        from PIL import Image

        try:
            with self._open() as file, Image.open(file) as image:
                width, height = image.size
                turned = _has_exif(image, file) and image.getexif().get(_ORIENTATION) in _TURNED
        except Exception as error:  # file systems and decoders raise many kinds
            raise self._unreadable(error) from error
        return (height, width) if turned else (width, height)

    def load(self) -> Image:
        """
        Return the image, decoded and turned upright. A file that cannot be read, or is no image, is a `ValueError`.
        """
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
