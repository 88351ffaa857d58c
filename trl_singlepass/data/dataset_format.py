"""What a dataset holds: conversations, rows made of them, or what stock `SFTTrainer` trains. Told by its columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset, Features, IterableDataset, LargeList, List, Value

from ..rendering.conversation import Conversation, RenderingError
from ..rendering.validation import MESSAGE_COLUMNS, expected_columns
from ..trees.rows import ROW_COLUMNS
from .bad_rows import group_errors
from .tokenized_turns import is_single_turn, turns_in


# Rows that are looked at: of a stream that does not say of what type its columns are, they tell.
_LOOKED_AT = 10
EXAMPLE = "example"
_LIST, _TEXT, _OTHER = "list", "text", "other"


def holds_rows(column_names: Iterable[str]) -> bool:
    """Return whether a dataset with these columns has already been prepared."""
    return set(ROW_COLUMNS) <= set(column_names)


def holds_turns(dataset: Any, *, text_field: str = "text", name: str = "train") -> bool:
    """
    Return whether a dataset holds conversations, or rows that were prepared from them.

    Columns and their types decide, not what one row holds: bad rows are for the preparation to name.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset`):
            Dataset that the user passed.
        text_field (`str`, *optional*, defaults to `"text"`):
            Column of plain text.
        name (`str`, *optional*, defaults to `"train"`):
            Name of the dataset, for error messages.

    Returns:
        `bool`: `True` for `messages`, conversational `prompt` + `completion`, ShareGPT `conversations`, turns that are
        tokens already (`turns`, or one per row), and rows; `False` for plain text and tokenised rows, which stock
        `SFTTrainer` trains as they are.

    Raises:
        `TypeError`: If it is no dataset, but splits or a list.
        `ValueError`: If it is empty, or holds nothing that can be trained.
    """
    check_is_dataset(dataset, name)
    first = list(islice(dataset, _LOOKED_AT))
    if not first:
        raise ValueError(f"The {name} dataset is empty. Expected at least one row.")
    columns = _column_types(dataset, first)
    if holds_rows(columns):
        return True
    if "input_ids" in columns:
        return False
    if columns.get("turns") == _LIST or is_single_turn(columns):
        return True
    if _hold_messages(columns):
        return True
    if _is_text(columns, text_field):
        return False
    if not ("turns" in columns or any(set(group) <= set(columns) for group in MESSAGE_COLUMNS)):
        raise ValueError(f"The {name} dataset has no column to train on. {_expected(columns, first, text_field)}")
    if isinstance(dataset, IterableDataset):
        _check_some_are_conversations(first, name)
    return True  # of a type that holds no messages: the preparation names the rows


def holds_messages(dataset: Dataset | IterableDataset) -> bool:
    """Return whether a dataset has columns of messages, whatever else it holds; a `formatting_func` may read them."""
    return _hold_messages(_column_types(dataset, list(islice(dataset, _LOOKED_AT))))


def _hold_messages(columns: Mapping[str, str]) -> bool:
    return any(all(columns.get(column) == _LIST for column in group) for group in MESSAGE_COLUMNS)


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Return the columns of a dataset; of a stream that does not tell them, those of its first rows."""
    if dataset.column_names is not None and not _is_transformed(dataset):
        return list(dataset.column_names)
    return list(dict.fromkeys(name for row in islice(dataset, _LOOKED_AT) for name in row))


def in_one_column(dataset: IterableDataset) -> IterableDataset:
    """
    Return a stream of rows as a stream of one column that holds them.

    A stream need not tell its columns, and may bring further ones later, which nobody could remove by name.

    Args:
        dataset (`datasets.IterableDataset`):
            Any stream.

    Returns:
        `datasets.IterableDataset`: The same rows under the column `EXAMPLE`.
    """
    return dataset.map(_in_one_column).select_columns([EXAMPLE])


def _in_one_column(example: Mapping[str, Any]) -> dict[str, Any]:
    return {EXAMPLE: dict(example)}


def check_is_dataset(dataset: Any, name: str) -> None:
    """
    Refuse what is no dataset, in TRL's words.

    Args:
        dataset (`Any`):
            What the user passed.
        name (`str`):
            Name of the dataset.

    Raises:
        `TypeError`: If it is neither a `Dataset` nor an `IterableDataset`.
    """
    if isinstance(dataset, Dataset | IterableDataset):
        return
    argument = f"{name}_dataset"
    way_out = f"Make one of rows in memory: {argument}=Dataset.from_list(rows)."
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(repr, dataset)) or "none"
        way_out = f"Pass one of its splits, {argument}=dataset[{next(iter(dataset), 'train')!r}]; it has {splits}."
    raise TypeError(
        f"`{argument}` must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`. {way_out}"
    )


def _features(dataset: Dataset | IterableDataset) -> Features | None:
    return None if _is_transformed(dataset) else dataset.features


def _is_transformed(dataset: Dataset | IterableDataset) -> bool:
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def _column_types(dataset: Dataset | IterableDataset, first: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    features = _features(dataset)
    if features is None:
        names = dict.fromkeys(name for row in first for name in row)
        return {name: _type_of_values([row.get(name) for row in first]) for name in names}
    names = dict.fromkeys(dataset.column_names or features)  # a format may hide some
    return {name: _type_of(features[name], name, first) for name in names if name in features}


def _type_of(feature: Any, name: str, first: Sequence[Mapping[str, Any]]) -> str:
    if isinstance(feature, List | LargeList | list):
        return _LIST
    if isinstance(feature, Value):
        return _TEXT if "string" in feature.dtype else _OTHER
    if isinstance(feature, dict):
        return _OTHER
    return _type_of_values([row.get(name) for row in first])  # such as Json, which is anything


def _type_of_values(values: Sequence[Any]) -> str:
    if any(isinstance(value, list) for value in values):
        return _LIST
    return _TEXT if any(isinstance(value, str) for value in values) else _OTHER


def _is_text(columns: Mapping[str, str], text_field: str) -> bool:
    pair = {columns.get("prompt"), columns.get("completion")}
    return columns.get(text_field, _LIST) != _LIST or pair == {_TEXT}


def _expected(columns: Mapping[str, str], first: Sequence[Mapping[str, Any]], text_field: str) -> str:
    lists = [name for name in columns if any(_looks_like_messages(row.get(name)) for row in first)]
    found = f" '{lists[0]}' looks like it: dataset.rename_column('{lists[0]}', 'messages')." if len(lists) == 1 else ""
    return f"{expected_columns(columns)}{found} Plain text is read from '{text_field}' (dataset_text_field)."


def _looks_like_messages(value: Any) -> bool:
    keys = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}
    return bool({"role", "from"} & set(keys))


def _check_some_are_conversations(first: Sequence[Mapping[str, Any]], name: str) -> None:
    """Refuse a stream none of whose first rows is read, before training begins."""
    reasons = []
    for index, row in enumerate(first):
        try:
            if turns_in(row) is None:
                Conversation.from_example(dict(row))
        except ValueError as error:
            reasons.append((index, str(error)))
    if len(reasons) == len(first):
        lines = "".join(f"\n- {error}" for error in group_errors(reasons))
        raise RenderingError(f"None of the first {len(first)} rows of the {name} dataset is a conversation:{lines}")
