"""What a processor writes into a prompt for an image of a given size, and what a model reads of the pixels."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..trees.errors import DataError


if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

Size = tuple[int, int]
"""Width and height in pixels."""

# Text that no processor touches, between the placeholders of a probe.
_MARKER = "Xqimageqx"
_PROBED_SIZES: tuple[Size, ...] = ((64, 64), (256, 96), (96, 256), (448, 448))
_KEPT = 4096  # expansions that are remembered


@dataclass(frozen=True, slots=True)
class Expansion:
    """What stands in a prompt for an image."""

    text: str  # replaces the placeholder of the chat template
    num_features: int  # number of its tokens that show a feature of the image


class ImagePlaceholders:
    """
    What a processor writes for images, whatever its class.

    It processes blank images, once per size, with a tokenizer that records the text that it gets. One without a
    placeholder (`image_token`), or that writes prompts in a way that depends on their text, is a `ValueError`.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor, self._name = processor, type(processor).__name__
        token = getattr(processor, "image_token", None)
        if not isinstance(token, str) or getattr(processor, "image_processor", None) is None:
            raise ValueError(
                f"{self._name} has no placeholder for images ('image_token'), so it cannot be told where they stand "
                "in a prompt. Use TRL's SFTTrainer, or remove the images."
            )
        self.text: str = token
        self._known: dict[tuple[Size, bool], Expansion] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the processor."""
        return self.processor.tokenizer

    @cached_property
    def token_id(self) -> int:
        """Id of the token that shows a feature: of the processor's image tokens, the one that it writes most often."""
        ids = self._encode(self._write([_PROBED_SIZES[0]])[0])
        candidates = [
            getattr(self.processor, "image_token_id", None),
            *getattr(self.processor, "image_token_ids", []),
            getattr(self.tokenizer, "image_token_id", None),
            self.tokenizer.convert_tokens_to_ids(self.text),
        ]
        known = [int(candidate) for candidate in candidates if candidate is not None]
        best = max(known, key=lambda candidate: int((ids == candidate).sum()))
        if best not in ids:
            raise DataError(f"{self._name} writes none of its image tokens {known} into a prompt with an image.")
        return best

    @cached_property
    def depends_on_company(self) -> bool:
        """Whether an image that stands alone in a prompt is expanded differently from one among others."""
        together = self._write(_PROBED_SIZES)
        return any(self._write([size]) != [text] for size, text in zip(_PROBED_SIZES, together, strict=True))

    def expand(self, size: Size, *, alone: bool = True) -> Expansion:
        """Return what stands in a prompt for an image, `alone` or not; a size that is refused is a `ValueError`."""
        key = size, alone or not self.depends_on_company
        if key not in self._known:
            text = self._write([size] if key[1] else [size, size])[0]
            num_features = int((self._encode(text) == self.token_id).sum())
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[key] = Expansion(text, num_features)
        return self._known[key]

    def process(self, images: Sequence[Image], num_alone: int = 0) -> dict[str, torch.Tensor]:
        """
        Return what a model reads of images, in their order, such as `pixel_values` and `image_grid_thw`.

        Where it makes a difference ([`depends_on_company`]), the first `num_alone` are alone in a prompt each, and the
        others share one, a single one with a copy of itself for company.
        """
        prompts = [list(images)]
        if self.depends_on_company and num_alone:
            others = list(images[num_alone:])
            prompts = [[image] for image in images[:num_alone]]
            prompts += [others * 2 if len(others) == 1 else others] if others else []
        texts = [self.text * len(prompt) for prompt in prompts]
        outputs: Mapping[str, Any] = self.processor(
            images=prompts, text=texts, return_tensors="pt", add_special_tokens=False, padding=True
        )
        of_text = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
        num_with_copy = sum(map(len, prompts))
        return {
            name: value[: len(images)] if len(value) == num_with_copy else value
            for name, value in outputs.items()
            if name not in of_text
        }

    def _write(self, sizes: Sequence[Size]) -> list[str]:
        """Return the text that the processor writes for each image of one prompt."""
        from PIL import Image

        recorder = _RecordingTokenizer(self.tokenizer)
        processor = copy.copy(self.processor)
        processor.tokenizer = recorder
        text = "".join(f"{_MARKER}{self.text}" for _ in sizes) + _MARKER
        blank = [[Image.new("RGB", size) for size in sizes]]
        processor(images=blank, text=[text], return_tensors="pt", add_special_tokens=False)
        parts = recorder.text.split(_MARKER)
        if len(parts) != len(sizes) + 2 or parts[0] or parts[-1]:
            raise DataError(
                f"{self._name} changes the text around the images of a prompt, so that turns with images cannot be "
                "rendered one by one. Use TRL's SFTTrainer."
            )
        return parts[1:-1]

    def _encode(self, text: str) -> NDArray[np.int64]:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)

    def count(self, text: str) -> int:
        """Return the number of placeholders in a rendering."""
        return text.count(self.text)

    def write(self, text: str, expansions: Sequence[Expansion]) -> str:
        """Return a rendering in which each placeholder is replaced by what the processor writes for its image."""
        texts = iter(expansions)
        return re.sub(re.escape(self.text), lambda match: next(texts).text, text)


@lru_cache(maxsize=8)
def placeholders_of(processor: ProcessorMixin) -> ImagePlaceholders:
    """Return what a processor writes for images; what it has been asked is remembered."""
    return ImagePlaceholders(processor)


class _RecordingTokenizer:
    """A tokenizer that remembers the text of its last call."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.text = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        (self.text,) = [text] if isinstance(text, str) else text
        return self._tokenizer(text, *args, **kwargs)
