"""From one preference pair to the samples of its two trajectories, and to its row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from trl import extract_prompt

from ..images.loading import EncodedImage
from ..trees.image_features import to_keys
from ..trees.sample import Sample
from .arrow import row_columns
from .bad_rows import BadRowError, get_reason
from .conversations import example_to_samples
from .images import image_columns_of
from .reader import ConversationReader, Reader, images_of_example
from .rows import PreparedRow, joined_row, with_images_numbered_together
from .selection import FittedSamples, OverlongTurnError, fit_samples
from .settings import PairSettings, PairTurns, RowSettings


SIDES = ("chosen", "rejected")
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
PAIR_COLUMNS = row_columns(SIDES)
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns that TRL adds to rows: log-probabilities of the reference."""
# Columns that say how messages are rendered, the same for both trajectories.
_RENDERING_COLUMNS = ("system", "tools", "chat_template_kwargs", "history")


@dataclass(frozen=True, slots=True)
class Pair:
    """Samples of the two trajectories of a pair."""

    chosen: FittedSamples
    rejected: FittedSamples
    # turns that both trajectories have in an equal context: their log-probabilities are equal, and cancel in every
    # loss that reads only the difference of the two
    num_shared_turns: int

    @property
    def sides(self) -> tuple[FittedSamples, FittedSamples]:
        """Both trajectories, the chosen one first."""
        return self.chosen, self.rejected

    @property
    def samples(self) -> list[Sample]:
        """All samples, those of the chosen trajectory first."""
        return [*self.chosen.samples, *self.rejected.samples]

    def to_row(self, index: int = 0, max_row_tokens: int | None = None) -> PreparedRow:
        """Return the row of the pair, example `index` of its dataset, empty if nothing is left of one side."""
        is_equal = 0 < self.num_shared_turns == len(self.chosen.samples) == len(self.rejected.samples)
        counts = {"num_shared_turns": self.num_shared_turns, "num_equal_examples": int(is_equal)}
        return joined_row(dict(zip(SIDES, self.sides, strict=True)), index, max_row_tokens, **counts)


def pair_to_rows(
    example: Mapping[str, Any], index: int, tokenizer: Reader, settings: PairSettings
) -> list[PreparedRow]:
    """Return the row of one example, empty if a side is too long to keep any of it (see [`example_to_pair`])."""
    return [example_to_pair(example, index, tokenizer, settings).to_row(index, settings.max_row_tokens)]


def example_to_pair(example: Mapping[str, Any], index: int, tokenizer: Reader, settings: PairSettings) -> Pair:
    """
    Return the samples of one example, every turn after the prompt in the context that a model is served.

    The example has `prompt`, `chosen` and `rejected` as lists of messages, or `chosen` and `rejected` that begin with
    the same messages; optionally `system`, `tools`, `chat_template_kwargs`, `history` and `images` or `image`. Or it
    has token ids, as TRL makes them of plain text: `prompt_ids`, `chosen_ids` and `rejected_ids`.

    A trajectory that cannot be rendered without losing part of a turn, or of which nothing is left, and trajectories
    without a common prompt raise `BadRowError`; a turn that is too long, if none may be, `OverlongTurnError`.
    """
    if set(TOKEN_COLUMNS) <= set(example):
        fitted = [_from_tokens(example, side, index, settings) for side in SIDES]
    else:
        trajectories = split_pair(example, index)
        fitted = [_render(trajectories[side], side, index, tokenizer, settings) for side in SIDES]
    fitted = with_images_numbered_together(fitted)
    num_leading, num_shared = _shared_turns(*(side.samples for side in fitted))
    if settings.train_turns == PairTurns.FROM_DIFFERENCE:
        fitted = [_without_first(side, num_leading) for side in fitted]
        num_shared -= num_leading
    for side, name in zip(fitted, SIDES, strict=True):
        _check(side, name, index, num_leading)
    chosen, rejected = fitted
    return Pair(chosen, rejected, num_shared)


def is_pair(example: object) -> bool:
    """Return whether an example is a preference pair, by its columns."""
    return isinstance(example, Mapping) and any(set(columns) <= set(example) for columns in (SIDES, TOKEN_COLUMNS))


def example_to_turns(example: Mapping[str, Any], index: int, tokenizer: Reader) -> list[Sample]:
    """Return what is trained of a conversation, or of both trajectories of a pair, at default settings."""
    if is_pair(example):
        return example_to_pair(example, index, tokenizer, PairSettings()).samples
    return list(example_to_samples(example, index, tokenizer, RowSettings()).samples)


def split_pair(example: Mapping[str, Any], index: int) -> dict[str, dict[str, Any]]:
    """
    Return each trajectory of a pair of messages as an example of its own, with the prompt that both share.

    A side that is not a list of messages, or sides without a prompt that do not begin alike, raise `BadRowError`.
    """
    for name in SIDES:
        if not isinstance(example.get(name), list) or not example[name]:
            raise BadRowError(f"Row {index}: {name!r} is {example.get(name)!r:.60}, expected a list of messages.")
    prompt = example.get("prompt")
    num_implicit = _num_common_messages(example) if prompt is None else 0
    if prompt is None and num_implicit == 0:
        raise BadRowError(
            f"Row {index}: there is no 'prompt', and 'chosen' and 'rejected' do not begin with the same message. A "
            "pair is two trajectories after one prompt: give it in 'prompt', or leave the row out."
        )
    prompt = example["chosen"][:num_implicit] if prompt is None else prompt
    shared = {name: example[name] for name in _RENDERING_COLUMNS if name in example} | image_columns_of(example)
    trajectories = {name: example[name][num_implicit:] for name in SIDES}
    if not prompt:
        return {name: {"messages": messages, **shared} for name, messages in trajectories.items()}
    return {name: {"prompt": prompt, "completion": messages, **shared} for name, messages in trajectories.items()}


def _num_common_messages(example: Mapping[str, Any]) -> int:
    """Return how many messages both trajectories begin with, where Arrow may have added keys to either."""
    return len(extract_prompt({name: _without_nulls(example[name]) for name in SIDES})["prompt"])


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _render(
    example: Mapping[str, Any], side: str, index: int, tokenizer: Reader, settings: PairSettings
) -> FittedSamples:
    if isinstance(tokenizer, ConversationReader) and tokenizer.dataset is not None:
        tokenizer = replace(tokenizer, dataset=images_name(tokenizer.dataset, side))
    try:
        fitted = example_to_samples(example, index, tokenizer, settings.for_trajectory())
    except (BadRowError, OverlongTurnError) as error:
        raise type(error)(f"Row {index}: in {side!r}: {get_reason(error, index)}") from error
    weights = {float(weight) for sample in fitted.samples for weight in np.unique(sample.loss_weights)}
    if foreign := weights - {0.0, 1.0}:
        raise BadRowError(
            f"Row {index}: a message of {side!r} has weight={min(foreign)}, but log π counts each token once. Give it "
            "the weight 1, or 0 to make it context."
        )
    return fitted


def _from_tokens(example: Mapping[str, Any], side: str, index: int, settings: PairSettings) -> FittedSamples:
    try:
        sample = Sample.from_prompt_and_completion(example["prompt_ids"], example[f"{side}_ids"])
    except ValueError as error:
        raise BadRowError(f"Row {index}: in {side!r}: {error}") from error
    return fit_samples([sample], settings.for_trajectory().longest_sample, settings.overlong_turns)


def _shared_turns(chosen: Sequence[Sample], rejected: Sequence[Sample]) -> tuple[int, int]:
    """Return how many turns the trajectories begin with alike, and how many they share at all."""
    equal = [_are_equal(*turns) for turns in zip(chosen, rejected, strict=False)]
    return next((i for i, same in enumerate(equal) if not same), len(equal)), sum(equal)


def _are_equal(one: Sample, other: Sample) -> bool:
    tokens, others = (to_keys(sample.token_ids, sample.image_features) for sample in (one, other))
    return np.array_equal(tokens, others) and np.array_equal(one.loss_weights, other.loss_weights)


def images_name(dataset: str, side: str) -> str:
    """Return the name by which rows refer to the images of one trajectory of each pair of a dataset."""
    return f"{dataset}:{side}"


def images_of_trajectory(example: Mapping[str, Any], side: str) -> list[EncodedImage]:
    """Return the images of one trajectory of a pair, in the order in which its rows count them."""
    return images_of_example(split_pair(example, 0)[side])


def _without_first(side: FittedSamples, number: int) -> FittedSamples:
    left_out = sum(sample.num_trained_tokens for sample in side.samples[:number])
    counts = Counter(side.counts)
    counts.update(num_unselected_turns=number, num_trained_tokens=-left_out)
    return replace(side, samples=side.samples[number:], counts=counts)


def _check(side: FittedSamples, name: str, index: int, num_leading: int) -> None:
    if side.samples or side.counts["num_dropped_turns"]:  # a pair of which a side is too long is dropped and counted
        return
    reason = "no turn that counts: all are context, or empty"
    if num_leading:
        reason = f"no turn left after the {num_leading} that both trajectories share"
    raise BadRowError(f"Row {index}: {name!r} has {reason}. Repair it, or leave it out.")
