"""Turns that are tokens already, as inference servers log them: no template takes part."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from ..trees.sample import Sample


TURN_COLUMNS = ("prompt_ids", "completion_ids")


def samples_of_turns(turns: Sequence[Mapping[str, Any]], vocab_size: int | None = None) -> list[Sample]:
    """
    Return tokenised turns as samples.

    Args:
        turns (`Sequence[Mapping[str, Any]]`):
            Turns in the order of the conversation, each with `prompt_ids` and `completion_ids` (token in, token out)
            and optionally `completion_weights`, one loss weight per completion token.
        vocab_size (`int`, *optional*):
            Number of tokens of the model; larger ids are refused.

    Returns:
        `list[Sample]`: One sample per turn.

    Raises:
        `ValueError`: If there is no turn, a turn lacks its ids or has no completion, an id is outside the vocabulary,
            or weights do not fit the completion.
    """
    if not turns:
        raise ValueError("Expected at least one turn in 'turns', got none. Leave the row out.")
    return [_sample(turn, index, vocab_size) for index, turn in enumerate(turns)]


def is_single_turn(columns: Collection[str]) -> bool:
    """Return whether rows with these columns are single turns of a log."""
    return set(TURN_COLUMNS) <= set(columns)


def gather_turns(dataset: Dataset | IterableDataset) -> Dataset:
    """
    Return a log with one turn per row as a dataset with one conversation per row.

    Args:
        dataset (`datasets.Dataset`):
            Rows with `prompt_ids`, `completion_ids` and `conversation_id`, in the order of their turns; those of one
            conversation need not stand together.

    Returns:
        `datasets.Dataset`: One row per conversation, in the order of their first turns, with a column `turns`.

    Raises:
        `ValueError`: If there is no `conversation_id`, or the log is a stream, which has no end at which a
            conversation would be known to be complete.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "A stream of single turns cannot be gathered into conversations, since a conversation may go on at any "
            "time. Stream rows with a 'turns' column, or load the log whole."
        )
    if "conversation_id" not in dataset.column_names:
        raise ValueError(
            f"Single turns need a 'conversation_id' column to be gathered by; got the columns {dataset.column_names}."
        )
    rows_of: dict[Any, list[int]] = {}
    for index, conversation in enumerate(dataset["conversation_id"]):
        rows_of.setdefault(conversation, []).append(index)
    return Dataset.from_dict({"rows": list(rows_of.values())}).map(
        _turns_at, fn_kwargs={"log": dataset}, remove_columns="rows", desc="Gathering turns by conversation"
    )


def _turns_at(example: Mapping[str, Any], log: Dataset) -> dict[str, list[dict[str, Any]]]:
    return {"turns": [log[index] for index in example["rows"]]}


def _sample(turn: Mapping[str, Any], index: int, vocab_size: int | None) -> Sample:
    missing = [name for name in TURN_COLUMNS if turn.get(name) is None]
    if missing:
        raise ValueError(f"Turn {index} has no {missing[0]!r}; got the keys {sorted(turn)}.")
    prompt, completion = (np.asarray(turn[name], np.int64) for name in TURN_COLUMNS)
    if len(prompt) == 0 or len(completion) == 0:
        empty = "prompt_ids" if len(prompt) == 0 else "completion_ids"
        raise ValueError(f"Turn {index} has empty {empty!r}: there is nothing to train or nothing to train it from.")
    token_ids = np.concatenate([prompt, completion])
    if token_ids.min() < 0 or (vocab_size is not None and token_ids.max() >= vocab_size):
        wrong = token_ids[(token_ids < 0) | (token_ids >= (vocab_size or np.inf))][0]
        raise ValueError(
            f"Turn {index} has the token id {wrong}, but the vocabulary has {vocab_size or 'only positive'} ids. "
            "Log the turns with the tokenizer of the model that is trained."
        )
    weights = turn.get("completion_weights")
    if weights is None:
        return Sample.from_prompt_and_completion(prompt, completion, index)
    if len(weights) != len(completion):
        raise ValueError(
            f"Turn {index} has {len(weights)} completion_weights for {len(completion)} completion tokens. Give one "
            "weight per token, or none at all."
        )
    try:
        return Sample(token_ids, np.concatenate([np.zeros(len(prompt)), weights]), len(prompt), index)
    except ValueError as error:
        raise ValueError(f"Turn {index}: {error}") from error
