"""Examples with images: read through a processor, so that rows hold references to images in the place of pixels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..images.conversation_images import ConversationImages
from ..images.loading import EncodedImage
from ..images.placeholders import ImagePlaceholders, placeholders_of
from ..rendering.conversation import Conversation
from ..rendering.template import with_template
from ..rendering.validation import IMAGES_WAY_OUT
from ..trees.errors import DataError
from ..trees.sample import Sample
from .dataset_format import column_names
from .images import holds_images, image_column_names, take_images


@dataclass(frozen=True)
class ConversationReader:
    """Reads examples with images."""

    placeholders: ImagePlaceholders
    dataset: str | None = None  # name by which rows refer to its images; `None`: references hold the images, encoded

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the processor."""
        return self.placeholders.tokenizer

    @property
    def chat_template(self) -> str | None:
        """Chat template of the processor, `None` if only its tokenizer has one."""
        template: Any = self.placeholders.processor.chat_template
        return template.get("default") if isinstance(template, Mapping) else template

    def read_conversation(self, example: Mapping[str, Any], index: int) -> Conversation:
        """
        Return an example as a conversation with its images; `index` is its index in the dataset.

        Raises `ValueError` if it is no conversation, or an image is missing or cannot be read.
        """
        rest, images = take_images(example)
        return Conversation.from_example(rest, self._conversation_images(images, index))

    def add_images(self, samples: Sequence[Sample], turns: Sequence[Mapping[str, Any]], index: int) -> list[Sample]:
        """
        Return the samples of tokenised turns with the features that their tokens show.

        `images` of a turn are those that its prompt shows, in order. Raises `ValueError` if tokens and images of a
        turn do not fit together, or an image cannot be read.
        """
        of_turns = [[EncodedImage.from_value(image) for image in turn.get("images") or ()] for turn in turns]
        images = self._conversation_images([image for of_turn in of_turns for image in of_turn], index)
        added, first = [], 0
        for number, (sample, of_turn) in enumerate(zip(samples, of_turns, strict=True)):
            shown = range(first, first + len(of_turn))
            first += len(of_turn)
            try:
                features = images.features_in(sample.token_ids, shown)
                added.append(replace(sample, image_features=features, images=images.references))
            except ValueError as error:
                raise DataError(f"Turn {number}: {error}") from error
        return added

    def _conversation_images(self, images: Sequence[EncodedImage], index: int) -> ConversationImages:
        sources = None
        if self.dataset is not None:
            sources = [{"dataset": self.dataset, "row": index, "index": i} for i in range(len(images))]
        return ConversationImages.from_encoded(images, self.placeholders, sources)


Reader: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin | ConversationReader
"""What reads examples: a tokenizer with a chat template; for examples with images, the processor or a reader of it."""


def images_of_example(example: Mapping[str, Any]) -> list[EncodedImage]:
    """Return the images of an example, in the order in which its rows count them."""
    if isinstance(example.get("turns"), list):
        return [EncodedImage.from_value(image) for turn in example["turns"] for image in turn.get("images") or ()]
    return take_images(example)[1]


def as_reader(processing_class: Reader) -> PreTrainedTokenizerBase | ConversationReader:
    """Return a processor as the reader of examples whose rows hold their images; anything else as it is."""
    if isinstance(processing_class, ProcessorMixin):
        return ConversationReader(placeholders_of(processing_class))
    return processing_class


def get_tokenizer(processing_class: Reader) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor or reader, or the tokenizer itself."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return processing_class
    return processing_class.tokenizer


def check_renders(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
    """
    Refuse a tokenizer that writes conversations without a Jinja template, as that of mistral-common does. One that
    only lacks a template is another error.
    """
    tokenizer = get_tokenizer(processing_class)
    try:
        tokenizer.get_chat_template()
    except NotImplementedError as error:
        raise ValueError(
            f"{type(tokenizer).__name__} renders without a Jinja chat template, so the parts of a turn cannot be told "
            "apart. Where the model has a tokenizer with a chat_template as well, load that one, with "
            "AutoTokenizer.from_pretrained(model, mistral_format=False) or without mistral-common installed. Or pass "
            "token ids: a column 'turns', or for pairs 'prompt_ids', 'chosen_ids' and 'rejected_ids'."
        ) from error
    except ValueError:  # no template, or none that is called 'default': another error says what to do
        return


def with_chat_template(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, chat_template: str | None
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """Return a tokenizer with another template, if there is one; a processor and its tokenizer have the same one."""
    check_renders(processing_class)
    if not isinstance(processing_class, ProcessorMixin):
        return with_template(processing_class, chat_template)
    processor = copy.copy(processing_class)
    processor.tokenizer = with_template(processor.tokenizer, chat_template or processor.chat_template)
    processor.chat_template = processor.tokenizer.chat_template
    return processor


def _check_has_template(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
    """Refuse a tokenizer without a chat template, once for all rows: none of them is at fault."""
    if not (processing_class.chat_template or get_tokenizer(processing_class).chat_template):
        raise ValueError(
            "The tokenizer has no chat template, with which conversations are rendered. Give it one: in the folder of "
            "the model as chat_template.jinja, as tokenizer.chat_template, or, to fine-tune on conversations, with "
            "the setting chat_template_path (--chat_template_path), a file or a model that has one."
        )


def reader_for(
    dataset: Dataset | IterableDataset, processing_class: PreTrainedTokenizerBase | ProcessorMixin
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """
    Return what reads a dataset: the processor if it has images, else the tokenizer, with the chat template of the
    processor if that has another one.

    Raises `ValueError` if the dataset has a column of images, and there is no processor; or if it holds messages, and
    the tokenizer has no chat template to render them with, or none in Jinja.
    """
    if not {"turns", "prompt_ids"} & set(column_names(dataset)):
        check_renders(processing_class)
        _check_has_template(processing_class)
    if not isinstance(processing_class, ProcessorMixin):
        if names := image_column_names(dataset.column_names or ()):
            raise ValueError(
                f"The dataset has a column of images, and a tokenizer cannot read them. {IMAGES_WAY_OUT}: "
                f"dataset.remove_columns({names})."
            )
        return processing_class
    if holds_images(dataset):
        return processing_class
    tokenizer, template = processing_class.tokenizer, processing_class.chat_template
    if isinstance(template, str) and template != tokenizer.chat_template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer
