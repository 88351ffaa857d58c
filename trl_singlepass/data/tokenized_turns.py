"""Turns that are tokens already, as inference servers log them: no template takes part."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from numpy.typing import NDArray

from ..rendering.validation import MESSAGE_COLUMNS, describe_type
from ..trees.sample import Sample
from .bad_rows import RowErrors, dropped, group_errors, refusal
from .settings import BadRows
from .weights import message_weights


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
    return [_sample(turn, f"Turn {index}", index, vocab_size) for index, turn in enumerate(turns)]


def turns_in(row: Mapping[str, Any]) -> list[Any] | None:
    """
    Return the tokenised turns of a dataset row.

    Args:
        row (`Mapping[str, Any]`):
            Dataset row.

    Returns:
        `list` or `None`: Its `turns`; `None` if the row holds messages instead.

    Raises:
        `ValueError`: If it holds neither.
    """
    turns = row.get("turns")
    if isinstance(turns, list):
        return turns
    if "turns" in row and not any(set(columns) <= set(row) for columns in MESSAGE_COLUMNS):
        raise ValueError(
            f"'turns' is {describe_type(turns)}, expected a list of turns, each with 'prompt_ids' and "
            "'completion_ids'. Repair it, or leave the row out."
        )
    return None


def is_single_turn(columns: Collection[str]) -> bool:
    """Return whether rows with these columns are single turns of a log."""
    return set(TURN_COLUMNS) <= set(columns)


def gather_turns(
    dataset: Dataset | IterableDataset,
    vocab_size: int | None = None,
    *,
    bad_rows: BadRows = "error",
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset, tuple[RowErrors, ...]]:
    """
    Return a log with one turn per row as a dataset with one conversation per row.

    Args:
        dataset (`datasets.Dataset`):
            Rows with `prompt_ids`, `completion_ids` and `conversation_id`, in the order of their turns; those of one
            conversation need not stand together.
        vocab_size (`int`, *optional*):
            Number of tokens of the model; larger ids are refused.
        bad_rows (`str`, *optional*, defaults to `"error"`):
            Whether bad rows of the log stop the preparation, or are left out (`"drop"`).
        num_proc (`int`, *optional*):
            Number of processes.
        name (`str`, *optional*, defaults to `"train"`):
            Name of the dataset in progress bars and errors.

    Returns:
        `tuple[Dataset, tuple[RowErrors, ...]]`: One row per conversation, in the order of their first turns, with a
        column `turns`; and the rows of the log that were left out.

    Raises:
        `ValueError`: If there is no `conversation_id`, a row is bad and may not be left out, or the log is a stream,
            which has no end at which a conversation would be known to be complete.
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
    checked = dataset.map(
        _check_turn,
        fn_kwargs={"vocab_size": vocab_size},
        remove_columns=dataset.column_names,
        features=Features({"reason": Value("string")}),
        num_proc=num_proc,
        desc=f"Checking turns of {name} dataset",
    )
    bad = {index: reason for index, reason in enumerate(checked["reason"]) if reason is not None}
    errors = group_errors(bad.items())
    if errors and bad_rows == "error":
        raise refusal(errors, len(dataset), name)
    if len(bad) == len(dataset):
        raise ValueError(f"Nothing of the {name} dataset is trained: {dropped(errors)}. Repair its rows.")
    rows_of: dict[Any, list[int]] = {}
    for index, conversation in enumerate(dataset["conversation_id"]):
        if index not in bad:
            rows_of.setdefault(conversation, []).append(index)
    gathered = Dataset.from_dict({"rows": list(rows_of.values())}).map(
        _turns_at, fn_kwargs={"log": dataset}, remove_columns="rows", desc="Gathering turns by conversation"
    )
    return gathered, errors


def _check_turn(row: Mapping[str, Any], vocab_size: int | None) -> dict[str, str | None]:
    try:
        if not isinstance(row["conversation_id"], Hashable) or row["conversation_id"] is None:
            raise ValueError(
                f"Its 'conversation_id' is {describe_type(row['conversation_id'])}, so it belongs to no conversation. "
                "Give it a number or a name."
            )
        _sample(row, "The turn", 0, vocab_size)
        message_weights([row])
    except ValueError as error:
        return {"reason": str(error)}
    return {"reason": None}


def _turns_at(example: Mapping[str, Any], log: Dataset) -> dict[str, list[dict[str, Any]]]:
    return {"turns": [log[index] for index in example["rows"]]}


def _sample(turn: Any, where: str, index: int, vocab_size: int | None) -> Sample:
    if not isinstance(turn, Mapping):
        raise ValueError(
            f"{where} is {describe_type(turn)}, expected an object with 'prompt_ids' and 'completion_ids'."
        )
    missing = [name for name in TURN_COLUMNS if turn.get(name) is None]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}; got the keys {sorted(turn)}. Repair it, or leave it out.")
    prompt, completion = (_token_ids(turn[name], f"{where} has {name!r}") for name in TURN_COLUMNS)
    if len(prompt) == 0 or len(completion) == 0:
        empty = "prompt_ids" if len(prompt) == 0 else "completion_ids"
        raise ValueError(f"{where} has empty {empty!r}: there is nothing to train or nothing to train it from.")
    token_ids = np.concatenate([prompt, completion])
    if token_ids.min() < 0 or (vocab_size is not None and token_ids.max() >= vocab_size):
        wrong = token_ids[(token_ids < 0) | (token_ids >= (vocab_size or np.inf))][0]
        raise ValueError(
            f"{where} has the token id {wrong}, but the vocabulary has {vocab_size or 'only positive'} ids. "
            "Log the turns with the tokenizer of the model that is trained."
        )
    if turn.get("completion_weights") is None:
        return Sample.from_prompt_and_completion(prompt, completion, index)
    weights = _numbers(turn["completion_weights"], f"{where} has 'completion_weights'", "numbers")
    if len(weights) != len(completion):
        raise ValueError(
            f"{where} has {len(weights)} completion_weights for {len(completion)} completion tokens. Give one "
            "weight per token, or none at all."
        )
    try:
        return Sample(token_ids, np.concatenate([np.zeros(len(prompt)), weights]), len(prompt), index)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _token_ids(value: Any, what: str) -> NDArray[np.int64]:
    ids = _numbers(value, what, "token ids")
    if not np.array_equal(ids, np.floor(ids)):  # whole numbers that pandas made floats are fine
        raise ValueError(f"{what} that is not a list of token ids: {_short(value)}. Expected whole numbers.")
    return ids.astype(np.int64)


def _numbers(value: Any, what: str, expected: str) -> NDArray[Any]:
    try:
        numbers = np.asarray(value)
    except ValueError:  # lists of unequal lengths
        numbers = np.asarray(None)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iuf"):
        raise ValueError(f"{what} that is not a list of {expected}: {_short(value)}. Repair it, or leave it out.")
    return numbers


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
