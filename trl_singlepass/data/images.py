"""Images of examples: taken out of columns and messages, so that templates see placeholders and rows references."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset
from datasets import Image as ImageFeature

from ..images.loading import EncodedImage
from ..rendering.validation import IMAGE_PARTS, IMAGES_WAY_OUT, MESSAGE_COLUMNS, is_image_part
from ..trees.errors import DataError


# Where TRL finds a column of one of these names, it prepares nothing and refuses packing.
_HIDDEN = {"images": "singlepass_images", "image": "singlepass_image"}
_COLUMNS = (*_HIDDEN, *_HIDDEN.values())
_PAYLOADS = ("image", "url", "path", "base64", "image_url")
_MESSAGES = (*(name for group in MESSAGE_COLUMNS for name in group), "chosen", "rejected")
_NUM_FIRST = 10  # examples of a stream that are looked at

Message = dict[str, Any]


def hide_image_columns(dataset: Any) -> Any:
    """Return a dataset whose columns of images have names that TRL does not look for; anything else as it is."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    columns = dataset.column_names or next(iter(dataset), ())  # a stream need not tell them
    names = {name: hidden for name, hidden in _HIDDEN.items() if name in columns}
    return dataset.rename_columns(names) if names else dataset


def with_images_named(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return an example, read from a dataset whose columns of images may be hidden, with these under their names."""
    shown = {hidden: name for name, hidden in _HIDDEN.items()}
    return {shown.get(name, name): value for name, value in example.items()}


def image_columns_of(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of an example that hold images, whether hidden or not."""
    return {name: example[name] for name in _COLUMNS if name in example}


def image_column_names(columns: Iterable[str]) -> list[str]:
    """Return which of these columns hold images, by the names that the user gave them."""
    return list(with_images_named(dict.fromkeys(name for name in columns if name in _COLUMNS)))


def holds_images(dataset: Dataset | IterableDataset | Sequence[Any]) -> bool:
    """
    Return whether examples of a dataset may have images, in a column, in messages or in tokenised turns.

    Looks at the first examples of a stream; in a stored dataset where only messages hold images, at all messages.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        return any(_has_images({"messages": row} if isinstance(row, list) else row) for row in dataset)
    if image_column_names(dataset.column_names or ()):
        return True
    if isinstance(dataset, IterableDataset) or dataset.format["type"] == "custom":
        return any(_has_images(example) for example in dataset.take(_NUM_FIRST))
    columns = {*_MESSAGES, "turns"} & set(dataset.column_names)
    return any(_column_has_images(chunk) for name in columns for chunk in dataset.data.column(name).chunks)


def _has_images(example: Mapping[str, Any]) -> bool:
    if image_column_names(example):
        return True
    turns = example.get("turns")
    if isinstance(turns, list):
        return any(isinstance(turn, Mapping) and turn.get("images") for turn in turns)
    lists = (example.get(name) for name in _MESSAGES)
    messages = [message for group in lists if isinstance(group, list) for message in group]
    return any(is_image_part(part) for message in messages for part in _parts(message))


def check_no_images(example: Mapping[str, Any]) -> None:
    """Refuse images in columns of an example that a tokenizer reads: it would train the text without them."""
    if any(example.get(name) is not None and example[name] != [] for name in _COLUMNS):
        raise DataError(f"The example has images, and a tokenizer cannot read them. {IMAGES_WAY_OUT}.")


def _column_has_images(array: pa.Array, name: str = "") -> bool:
    """Whether a column of messages or turns holds a part of an image's type, or a list of images."""
    if pa.types.is_struct(array.type):
        fields = [array.type.field(i).name for i in range(array.type.num_fields)]
        return any(_column_has_images(array.field(i), field) for i, field in enumerate(fields))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        if name == "images" and len(array.values):
            return True
        return _column_has_images(array.values, name)
    if isinstance(array, pa.ExtensionArray):  # JSON, where contents are text and lists by turns
        found = pc.match_substring_regex(array.storage, rf'"type": ?"({"|".join(IMAGE_PARTS)})"')
    elif name == "type" and (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        found = pc.is_in(array, pa.array(IMAGE_PARTS, array.type))
    else:
        return False
    return bool(pc.any(found).as_py())


def take_images(example: Mapping[str, Any]) -> tuple[dict[str, Any], list[EncodedImage]]:
    """
    Take the images out of an example.

    Images stand in a column `images` or `image`, in content parts, or both: parts without an image of their own are
    filled from the column, in order. Where no message has such a part, the images of the column stand at the start of
    the first user message, as in TRL.

    Returns the example with parts `{"type": "image"}` in place of the images, and the images in the order of these
    parts. Raises `ValueError` if there are more parts than images, or fewer, or something is no image.
    """
    rest = {name: value for name, value in example.items() if name not in _COLUMNS}
    given = [EncodedImage.from_value(image) for image in _column_images(example)]
    groups = [name for group in MESSAGE_COLUMNS for name in group if isinstance(rest.get(name), list)]
    messages = [message for name in groups for message in rest[name]]
    images = [_payload(part) for message in messages for part in _parts(message) if is_image_part(part)]
    num_empty = sum(image is None for image in images)
    if given and not images:
        rest, images, num_empty = _at_first_user_message(rest, groups, len(given)), [None] * len(given), len(given)
    if num_empty != len(given):
        raise DataError(
            f"The example has {len(given)} images in its column, and {num_empty} parts of the type 'image' without an "
            "image of their own. Give one image per part."
        )
    filling = iter(given)
    taken = [next(filling) if image is None else EncodedImage.from_value(image) for image in images]
    for name in groups:
        rest[name] = [_without_payloads(message) for message in rest[name]]
    return rest, taken


def _parts(message: object) -> Sequence[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, list) else ()


def _column_images(example: Mapping[str, Any]) -> list[Any]:
    for name in _COLUMNS:
        value = example.get(name)
        if value is not None:
            return list(value) if isinstance(value, list | tuple) else [value]
    return []


def _payload(part: Mapping[str, Any]) -> Any:
    """Return the image that a part holds, in whatever form, `None` if it holds none."""
    value = next((part[key] for key in _PAYLOADS if part.get(key) is not None), None)
    return value.get("url") if isinstance(value, Mapping) and "url" in value else value


def _without_payloads(message: Any) -> Any:
    """Return a message with bare image parts, and without the keys that Arrow adds to parts."""
    if not _parts(message):
        return message
    parts = [
        {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else part
        for part in _parts(message)
    ]
    bare = [
        {**{key: value for key, value in part.items() if key not in _PAYLOADS}, "type": "image"}
        if is_image_part(part)
        else part
        for part in parts
    ]
    return {**message, "content": bare}


def _at_first_user_message(example: dict[str, Any], groups: Sequence[str], number: int) -> dict[str, Any]:
    """Return an example with image parts at the start of its first user message whose content is text."""
    for name in groups:
        for index, message in enumerate(example[name]):
            content = message.get("content") if isinstance(message, Mapping) else None
            if isinstance(content, str) and (message.get("role") or message.get("from")) in ("user", "human"):
                parts = [*({"type": "image"} for _ in range(number)), {"type": "text", "text": content}]
                messages = [*example[name][:index], {**message, "content": parts}, *example[name][index + 1 :]]
                return {**example, name: messages}
    return example


def undecoded(dataset: Dataset) -> Dataset:
    """
    Return a dataset that leaves images encoded, without copying it.

    Raises `ValueError` if a column of images is to be converted to another mode when it is decoded.
    """
    plain = _undecoded(dataset.features)
    if plain == dataset.features:
        return dataset
    twin = copy.copy(dataset)
    twin._info = copy.copy(dataset.info)
    twin._info.features = Features(plain)
    return twin


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, ImageFeature):
        if feature.mode not in (None, "RGB"):
            raise ValueError(
                f"A column of images has the mode {feature.mode!r}, and would be converted each time it is read. "
                "Convert the images, and cast the column to Image()."
            )
        return ImageFeature(decode=False)
    if isinstance(feature, Mapping):
        return {name: _undecoded(item) for name, item in feature.items()}
    if hasattr(feature, "feature"):
        twin = copy.copy(feature)
        twin.feature = _undecoded(feature.feature)
        return twin
    return [_undecoded(item) for item in feature] if isinstance(feature, list) else feature
