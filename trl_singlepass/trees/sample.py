"""One turn as the model sees it: the exact tokens of prompt and completion, with a loss weight for each token."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .image_features import NO_FEATURE, ImageReference
from .shared_array import SharedArray


# Parts of a completion, in the order in which `Sample.token_parts` numbers them.
PARTS = ("reasoning", "first_answer_token", "later_answer_tokens")


class CompletionKind(StrEnum):
    """How the completion of a turn came about."""

    AS_SERVED = "as served"
    """The template's rendering continues the prompt."""
    HISTORY_REWRITTEN = "history rewritten"
    """The template rewrites earlier messages once this one is there; the message's own text follows the prompt."""
    OPENING_CONTINUED = "opening continued"
    """The prompt opens the answer with text that the template does not write before such a message."""
    REASONING_RESTORED = "reasoning restored"
    """The template leaves the reasoning out; it is put back where the model writes it."""
    GIVEN_AS_TOKENS = "given as tokens"
    """The dataset holds the tokens themselves."""


class _Stored:
    """A field of a sample that is stored as a [`SharedArray`] and read as an array."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, sample: Sample | None, owner: type) -> NDArray[Any]:
        if sample is None:
            raise AttributeError("the field has no default")  # how dataclasses ask a descriptor for one
        stored: SharedArray = sample.__dict__[self._name]
        return stored.tail(0)

    def __set__(self, sample: Sample, value: ArrayLike | SharedArray) -> None:
        stored = value if isinstance(value, SharedArray) else SharedArray.whole(value, self._dtype)
        sample.__dict__[self._name] = stored


@dataclass(frozen=True, eq=False)
class Sample:
    """
    Exact tokens of one turn: what N-pass trains as a sequence of its own.

    Rendered samples of one conversation share the beginnings of their tokens ([`SharedArray`]): their arrays are put
    together whenever they are read.

    Args:
        token_ids (`numpy.ndarray` of shape `(length,)`, `numpy.int64`):
            Prompt as served, followed by the completion as generated. Any sequence of integers is converted.
        loss_weights (`numpy.ndarray` of shape `(length,)`, `numpy.float64`):
            Factor of the loss of predicting each token from those before it; 0 for a token that is not trained. Any
            sequence of numbers is converted. Nothing precedes the first token, so its weight must be 0.
        prompt_length (`int`):
            Number of tokens of the prompt.
        message_index (`int`, *optional*):
            Index of the turn's assistant message in its conversation.
        reasoning_length (`int`, *optional*, defaults to 0):
            Number of tokens of reasoning at the start of the completion, the closing tag included.
        turn_index (`int`, *optional*, defaults to 0):
            Index of the turn among all turns of its conversation, trained or not.
        kind (`CompletionKind`, *optional*, defaults to `CompletionKind.GIVEN_AS_TOKENS`):
            How the completion came about.
        image_features (`numpy.ndarray` of shape `(length,)`, `numpy.int64`, *optional*):
            Feature that each token shows, counted over the images of the conversation, -1 for text (see
            `trees/image_features.py`); `None` without images. Any sequence of integers is converted.
        images (`tuple[ImageReference, ...]`, *optional*):
            The distinct images of the conversation, those of other turns among them, in the order of their features.
        text (`tuple[str, str]`, *optional*):
            Prompt and completion as rendered, with one placeholder per image; only of samples with images.
        has_empty_block (`bool`, *optional*, defaults to `False`):
            Whether the completion begins with an empty block of reasoning, which trains the model not to think.

    Raises:
        `ValueError`: If lengths disagree, a weight is negative or not finite, the first token or a token of an image
            carries a weight, or a feature belongs to no image.
    """

    token_ids: _Stored = _Stored(np.int64)
    loss_weights: _Stored = _Stored(np.float64)
    prompt_length: int  # type: ignore[misc]  # mypy takes the descriptors before it for defaults
    message_index: int | None = None
    reasoning_length: int = 0
    turn_index: int = 0
    kind: CompletionKind = CompletionKind.GIVEN_AS_TOKENS
    image_features: NDArray[np.int64] | None = None
    images: tuple[ImageReference, ...] = ()
    text: tuple[str, str] | None = None
    has_empty_block: bool = False

    def __post_init__(self) -> None:
        shapes = [stored.own.shape for stored in (self.tokens, self.weights)]
        if any(len(shape) != 1 for shape in shapes) or len(self.tokens) != len(self.weights):
            raise ValueError(
                f"A sample needs one loss weight per token, got token_ids of shape {shapes[0]} and loss_weights of "
                f"shape {shapes[1]}."
            )
        if len(self) == 0:
            raise ValueError("A sample needs at least one token, got none.")
        weights = self.weights.own
        if len(weights) and not (weights.min() >= 0 and weights.max() < np.inf):  # NaN compares as false
            raise ValueError(
                f"Loss weights must be finite and not negative, got {weights.min()} as the smallest and "
                f"{weights.max()} as the largest."
            )
        if self.weights.kept == 0 and weights[0] != 0:
            raise ValueError(
                "Nothing precedes the first token of a sample to predict it from, so its loss weight must be 0, "
                f"got {weights[0]}. Start the prompt with at least one token."
            )
        if not 0 <= self.prompt_length <= len(self):
            raise ValueError(
                f"prompt_length must lie between 0 and the number of tokens ({len(self)}), got {self.prompt_length}."
            )
        if not 0 <= self.reasoning_length <= len(self) - self.prompt_length:
            raise ValueError(
                f"reasoning_length must lie between 0 and the length of the completion "
                f"({len(self) - self.prompt_length}), got {self.reasoning_length}."
            )
        if self.image_features is not None:
            self._check_image_features()

    def _check_image_features(self) -> None:
        features = np.asarray(self.image_features, dtype=np.int64).view()
        features.setflags(write=False)
        object.__setattr__(self, "image_features", features)
        if features.shape != self.token_ids.shape:
            raise ValueError(
                f"A sample needs one image feature per token, -1 for text, got token_ids of shape "
                f"{self.token_ids.shape} and image_features of shape {features.shape}."
            )
        num_features = sum(image.num_features for image in self.images)
        if features.min() < NO_FEATURE or (self.images and features.max() >= num_features):
            raise ValueError(
                f"Image features must lie between -1 and the number of features of the images ({num_features}), got "
                f"{features.min()} as the smallest and {features.max()} as the largest."
            )
        if (self.loss_weights[features >= 0] > 0).any():
            raise ValueError(
                "A completion shows an image, which a model that writes text cannot learn to write. Put the image in "
                "a message of the user or of a tool."
            )

    @classmethod
    def from_prompt_and_completion(
        cls,
        prompt_ids: ArrayLike | SharedArray,
        completion_ids: ArrayLike,
        message_index: int | None = None,
        reasoning_length: int = 0,
        kind: CompletionKind = CompletionKind.GIVEN_AS_TOKENS,
        has_empty_block: bool = False,
    ) -> Sample:
        """Return the sample whose completion tokens have weight 1 and whose prompt tokens have weight 0."""
        prompt = prompt_ids if isinstance(prompt_ids, SharedArray) else SharedArray.whole(prompt_ids, np.int64)
        completion = np.asarray(completion_ids, dtype=np.int64)
        weights = SharedArray.zeros(len(prompt), np.float64).followed_by(np.ones(len(completion)))
        tokens = prompt.followed_by(completion)
        lengths = len(prompt), message_index, reasoning_length
        return cls(tokens, weights, *lengths, kind=kind, has_empty_block=has_empty_block)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def tokens(self) -> SharedArray:
        """`token_ids` as they are stored."""
        stored: SharedArray = self.__dict__["_token_ids"]
        return stored

    @property
    def weights(self) -> SharedArray:
        """`loss_weights` as they are stored. Entries that they share with another array are 0."""
        stored: SharedArray = self.__dict__["_loss_weights"]
        return stored

    @property
    def is_trained(self) -> bool:
        """Whether any token of the sample is trained."""
        return self.num_trained_tokens > 0

    @property
    def num_trained_tokens(self) -> int:
        """Number of tokens that are trained."""
        return int((self.weights.own > 0).sum())

    def with_turn_index(self, turn_index: int) -> Sample:
        """Return the sample as another turn of its conversation."""
        return _changed(self, turn_index=turn_index)

    def reweighed(self, own_weights: NDArray[np.float64]) -> Sample:
        """Return the sample with other loss weights in the place of `weights.own`."""
        return _changed(self, _loss_weights=self.weights.head(self.weights.kept).followed_by(own_weights))

    @property
    def token_parts(self) -> NDArray[np.int64]:
        """
        What each token belongs to: `1 + 3 · turn_index + i` for `PARTS[i]`, 0 for the prompt.

        With 2 tokens of prompt, 2 of reasoning and 3 of answer, turn 1 has `[0, 0, 4, 4, 5, 6, 6]`.
        """
        return self.token_parts_from(0)

    def token_parts_from(self, start: int) -> NDArray[np.int64]:
        """Return `token_parts` from position `start` on."""
        parts = np.full(len(self) - start, 3 + 3 * self.turn_index)
        prompt = max(self.prompt_length - start, 0)
        answer = max(self.prompt_length + self.reasoning_length - start, 0)
        parts[:prompt] = 0
        parts[prompt:answer] = 1 + 3 * self.turn_index
        if self.prompt_length + self.reasoning_length >= start:
            parts[answer : answer + 1] = 2 + 3 * self.turn_index
        return parts

    def truncated(self, max_length: int) -> Sample:
        """
        Return the sample's first `max_length` tokens (TRL's `truncation_mode="keep_start"`), without part of an image.

        An image that does not fit is left out whole, together with all that follows it. With an image at positions 2
        to 5, a sample that is cut to 4 tokens keeps 2.
        """
        max_length = self.length_of_whole_images(max_length)
        prompt_length = min(self.prompt_length, max_length)
        return replace(
            self,
            token_ids=self.tokens.head(max_length),
            loss_weights=self.weights.head(max_length),
            prompt_length=prompt_length,
            reasoning_length=min(self.reasoning_length, max_length - prompt_length),
            image_features=None if self.image_features is None else self.image_features[:max_length],
            text=None,
        )

    def length_of_whole_images(self, max_length: int) -> int:
        """Return the largest length up to a given one at which no image is cut."""
        if self.image_features is None or max_length >= len(self):
            return max_length
        shown = np.flatnonzero(self.image_features >= 0)
        assert self.images or not len(shown), "where an image ends is only known from the images"
        # Tokens of an image need not be adjacent: some models write markup between its rows.
        last_features = np.cumsum([image.num_features for image in self.images], dtype=np.int64) - 1
        features = self.image_features[shown]
        starts = shown[np.isin(features, [0, *(last_features[:-1] + 1)])]
        ends = shown[np.isin(features, last_features)]
        cut = [int(start) for start, end in zip(starts, ends, strict=True) if start < max_length <= end]
        return min([max_length, *cut])


def _changed(sample: Sample, **fields: Any) -> Sample:
    """Return a copy that shares the arrays of a sample; `dataclasses.replace` would put them together."""
    changed = copy(sample)
    changed.__dict__.update(fields)
    return changed
