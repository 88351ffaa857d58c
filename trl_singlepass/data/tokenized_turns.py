"""Turns that are tokens already, as inference servers log them: no chat template is involved."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from numpy.typing import NDArray

from ..rendering.validation import MESSAGE_COLUMNS, describe_type
from ..trees.errors import DataError
from ..trees.sample import Sample
from .bad_rows import BadRows, RowErrors, bad_rows_error, describe_dropped, group_errors
from .images import undecoded, with_images_named
from .weights import WEIGHT_RANGE, are_weights, message_weights


TURN_COLUMNS = ("prompt_ids", "completion_ids")


def tokenized_turns_to_samples(turns: Sequence[object], vocab_size: int | None = None) -> list[Sample]:
    """
    Return tokenised turns as samples, one for each.

    Turns are mappings, in the order of the conversation, with `prompt_ids` and `completion_ids` (token in, token out)
    and optionally `completion_weights`, one loss weight per completion token; anything else is a `ValueError`.
    """
    if not turns:
        raise DataError("Expected at least one turn in 'turns', got none. Leave the row out.")
    return [_to_sample(turn, f"Turn {index}", index, vocab_size) for index, turn in enumerate(turns)]


def get_tokenized_turns(example: Mapping[str, object]) -> list[Any] | None:
    """Return the `turns` of an example, `None` if it holds messages instead. One with neither is a `ValueError`."""
    turns = example.get("turns")
    if isinstance(turns, list):
        return turns
    if "turns" in example and not any(set(columns) <= set(example) for columns in MESSAGE_COLUMNS):
        raise DataError(
            f"'turns' is {describe_type(turns)}, expected a list of turns, each with 'prompt_ids' and "
            "'completion_ids'. Repair it, or leave the row out."
        )
    return None


def is_single_turn(columns: Collection[str]) -> bool:
    """Return whether examples with these columns are single turns of a log."""
    return set(TURN_COLUMNS) <= set(columns)


def gather_turns(
    log: Dataset,
    vocab_size: int | None = None,
    *,
    bad_rows: BadRows = BadRows.ERROR,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset, tuple[RowErrors, ...]]:
    """
    Return a log with one turn per row as a dataset with one conversation per example, and the rows that were left out.

    Rows of the log have `prompt_ids`, `completion_ids` and `conversation_id`, in the order of their turns; those of
    one conversation need not be adjacent. Conversations stand in the order of their first turns, in a column `turns`.

    Raises `ValueError` if there is no `conversation_id`, a row is bad and may not be left out, or the log is a stream.
    """
    if isinstance(log, IterableDataset):
        raise DataError(
            "A stream of single turns cannot be gathered into conversations, since a conversation may go on at any "
            "time. Stream rows with a 'turns' column, or load the log whole."
        )
    if "conversation_id" not in log.column_names:
        raise DataError(
            f"Single turns need a 'conversation_id' column to be gathered by; got the columns {log.column_names}."
        )
    bad = _find_bad_turns(log, vocab_size, num_proc, name)
    errors = group_errors(bad.items())
    if errors and bad_rows == BadRows.ERROR:
        raise bad_rows_error(errors, len(log), name)
    if len(bad) == len(log):
        raise ValueError(f"Nothing of the {name} dataset is trained: {describe_dropped(errors)}. Repair its rows.")
    conversations: dict[Hashable, list[int]] = {}
    for index, conversation in enumerate(log["conversation_id"]):
        if index not in bad:
            conversations.setdefault(conversation, []).append(index)
    gathered = Dataset.from_dict({"rows": list(conversations.values())}).map(
        _get_turns, fn_kwargs={"log": undecoded(log)}, remove_columns="rows", desc="Gathering turns by conversation"
    )
    return gathered, errors


def _find_bad_turns(log: Dataset, vocab_size: int | None, num_proc: int | None, name: str) -> dict[int, str]:
    """Return the index and reason of each row that cannot be trained."""
    checked = log.map(
        _check_turn,
        fn_kwargs={"vocab_size": vocab_size},
        remove_columns=log.column_names,
        features=Features({"reason": Value("string")}),
        num_proc=num_proc,
        desc=f"Checking turns of {name} dataset",
    )
    return {index: reason for index, reason in enumerate(checked["reason"]) if reason is not None}


def _check_turn(row: Mapping[str, object], vocab_size: int | None) -> dict[str, str | None]:
    try:
        conversation = row["conversation_id"]
        if conversation is None or not isinstance(conversation, Hashable):
            raise DataError(
                f"Its 'conversation_id' is {describe_type(conversation)}, so it belongs to no conversation. Give "
                "it a number or a name."
            )
        _to_sample(row, "The turn", 0, vocab_size)
        message_weights([row])
    except ValueError as error:
        return {"reason": str(error)}
    return {"reason": None}


def _get_turns(example: Mapping[str, list[int]], log: Dataset) -> dict[str, list[dict[str, object]]]:
    return {"turns": [with_images_named(log[index]) for index in example["rows"]]}


def _to_sample(turn: object, where: str, index: int, vocab_size: int | None) -> Sample:
    if not isinstance(turn, Mapping):
        raise DataError(
            f"{where} is {describe_type(turn)}, expected an object with 'prompt_ids' and 'completion_ids'."
        )
    missing = [name for name in TURN_COLUMNS if turn.get(name) is None]
    if missing:
        raise DataError(f"{where} has no {missing[0]!r}; got the keys {sorted(turn)}. Repair it, or leave it out.")
    prompt, completion = (_to_token_ids(turn[name], f"{where} has {name!r}") for name in TURN_COLUMNS)
    if len(prompt) == 0 or len(completion) == 0:
        empty = "prompt_ids" if len(prompt) == 0 else "completion_ids"
        raise DataError(f"{where} has empty {empty!r}: there is nothing to train or nothing to train it from.")
    token_ids = np.concatenate([prompt, completion])
    if token_ids.min() < 0 or (vocab_size is not None and token_ids.max() >= vocab_size):
        wrong = token_ids[(token_ids < 0) | (token_ids >= (vocab_size or np.inf))][0]
        raise DataError(
            f"{where} has the token id {wrong}, but the vocabulary has {vocab_size or 'only positive'} ids. "
            "Log the turns with the tokenizer of the model that is trained."
        )
    if turn.get("completion_weights") is None:
        return Sample.from_prompt_and_completion(prompt, completion, index)
    weights = _to_numbers(turn["completion_weights"], f"{where} has 'completion_weights'", "numbers")
    if len(weights) != len(completion):
        raise DataError(
            f"{where} has {len(weights)} completion_weights for {len(completion)} completion tokens. Give one "
            "weight per token, or none at all."
        )
    if not are_weights(weights):
        wrong = next(position for position, weight in enumerate(weights) if not are_weights(weight))
        raise DataError(
            f"{where} has {float(weights[wrong])} as completion_weights[{wrong}]. A weight is {WEIGHT_RANGE}."
        )
    return Sample(token_ids, np.concatenate([np.zeros(len(prompt)), weights]), len(prompt), index)


def _to_token_ids(value: object, what: str) -> NDArray[np.int64]:
    ids = _to_numbers(value, what, "token ids")
    if not np.array_equal(ids, np.floor(ids)):  # pandas may have turned whole numbers into floats
        raise DataError(f"{what} that is not a list of token ids: {_shorten(value)}. Expected whole numbers.")
    return ids.astype(np.int64)


def _to_numbers(value: object, what: str, expected: str) -> NDArray[Any]:
    try:
        numbers = np.asarray(value)
    except ValueError:  # lists of unequal lengths
        numbers = np.asarray(None)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iuf"):
        raise DataError(f"{what} that is not a list of {expected}: {_shorten(value)}. Repair it, or leave it out.")
    return numbers


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
