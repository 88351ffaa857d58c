"""Samples with images as text: what trainers take that process images together with the text around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Features, Image, List, Value
from transformers import ProcessorMixin

from ..data.bad_rows import BadRowError
from ..trees.image_features import shown_images
from ..trees.sample import Sample


TEXT_FEATURES = Features({"prompt": Value("string"), "completion": Value("string"), "images": List(Image())})
_WAY_OUT = "Export messages, with max_length=None and without weights, or train in a single pass"


def samples_as_text(samples: Sequence[Sample], processor: ProcessorMixin) -> dict[str, list[Any]]:
    """
    Return samples as rendered prompts and completions with their images, in the columns of `TEXT_FEATURES`.

    The references of the samples hold their images. If a trainer that processes the text would not train the same
    tokens with the same weights, this raises `BadRowError`.
    """
    return {
        "prompt": [_text(sample, processor)[0] for sample in samples],
        "completion": [_text(sample, processor)[1] for sample in samples],
        "images": [
            [
                {"path": image.source["path"], "bytes": image.source["bytes"]}
                for image in shown_images(sample.image_features, sample.images)
            ]
            for sample in samples
        ],
    }


def _text(sample: Sample, processor: ProcessorMixin) -> tuple[str, str]:
    where = f"Message {sample.message_index} cannot be written as text for a trainer that processes images"
    if sample.text is None:
        raise BadRowError(f"{where}: it is given as tokens, or cut by max_length. {_WAY_OUT}.")
    start = sample.prompt_length
    if not (np.isin(sample.loss_weights[start:], 1).all() and not sample.loss_weights[:start].any()):
        raise BadRowError(f"{where}: its loss weights are not all 1. {_WAY_OUT}.")
    completion = processor.tokenizer(sample.text[1], add_special_tokens=False)["input_ids"]
    if not np.array_equal(completion, sample.token_ids[start:]):
        raise BadRowError(f"{where}: its completion has other tokens alone than after its prompt. {_WAY_OUT}.")
    return sample.text
