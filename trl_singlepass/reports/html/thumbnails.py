"""Images of a conversation, small enough to stand in a page."""

from __future__ import annotations

import base64
from io import BytesIO

from ...images.loading import EncodedImage
from ...trees.image_features import ImageReference


_SIDE = 160  # pixels


def thumbnail(image: ImageReference) -> str:
    """
    Return an image as a data URL of at most 160 × 160 pixels.

    Args:
        image ([`ImageReference`]):
            Reference that holds its image.

    Returns:
        `str`: The URL.

    Raises:
        `ValueError`: If the image cannot be read.
    """
    loaded = EncodedImage(image.source.get("path"), image.source.get("bytes")).load().convert("RGB")
    loaded.thumbnail((_SIDE, _SIDE))
    file = BytesIO()
    loaded.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
