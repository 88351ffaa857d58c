"""What a dataset holds, by its columns: conversations, rows made from them, or what stock `SFTTrainer` trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import islice

from datasets import Dataset, Features, IterableDataset, LargeList, List, Value

from ..rendering.conversation import Conversation, RenderingError
from ..rendering.validation import MESSAGE_COLUMNS, expected_columns
from ..trees.rows import ROW_COLUMNS
from .bad_rows import count_of, group_errors
from .requests import split_requests
from .tokenized_turns import get_tokenized_turns, is_single_turn


# Examples that are looked at: a stream may not tell the types of its columns.
_NUM_FIRST = 10
EXAMPLE = "example"
# Of rows, those of other versions included; no other dataset has them.
_OWN_COLUMNS = frozenset({"subtree_end", "token_parts", "multiplicity"})


class _ColumnType(StrEnum):
    LIST = "list"
    TEXT = "text"
    OTHER = "other"


def holds_rows(column_names: Iterable[str]) -> bool:
    """
    Return whether a dataset with these columns has been prepared already; one that another version prepared, with
    columns that this one does not read, is a `ValueError`.
    """
    columns = set(column_names)
    if not _OWN_COLUMNS.isdisjoint(columns) and not set(ROW_COLUMNS) <= columns:
        raise ValueError(
            "The dataset was prepared by another version of trl-singlepass, or a map removed columns of its rows: "
            f"they lack {sorted(set(ROW_COLUMNS) - columns)}. Prepare it again, from its messages."
        )
    return set(ROW_COLUMNS) <= columns


def holds_turns(dataset: object, *, text_field: str = "text", name: str = "train") -> bool:
    """
    Return whether a dataset holds conversations, tokenised turns or rows, and not what stock `SFTTrainer` trains as it
    is, plain text and tokenised sequences.

    Columns and their types decide, not the content of single examples: it is preparation that names bad ones. Splits
    or a list are a `TypeError`; a dataset that is empty, or holds nothing that can be trained, is a `ValueError`.
    """
    checked = check_is_dataset(dataset, name)
    first = list(islice(checked, _NUM_FIRST))
    if not first:
        raise ValueError(f"The {name} dataset is empty. Expected at least one row.")
    columns = _column_types(checked, first)
    if holds_rows(columns):
        return True
    if "input_ids" in columns:
        return False
    if _ColumnType.LIST in (columns.get("turns"), columns.get("requests")) or is_single_turn(columns):
        return True
    if _hold_messages(columns):
        return True
    if _is_text(columns, text_field):
        return False
    if {"chosen", "rejected"} <= set(columns):
        raise ValueError(
            f"The {name} dataset holds preference pairs, which SinglePassDPOTrainer trains, and `trl-singlepass dpo`."
        )
    if not ({"turns", "requests"} & set(columns) or any(set(group) <= set(columns) for group in MESSAGE_COLUMNS)):
        raise ValueError(f"The {name} dataset has no column to train on. {_expected(columns, first, text_field)}")
    if isinstance(dataset, IterableDataset):
        _check_some_are_conversations(first, name)
    return True  # the types hold no messages: preparation names the bad examples


def holds_messages(dataset: Dataset | IterableDataset) -> bool:
    """Return whether a dataset has columns of messages, which a `formatting_func` may read, whatever else it holds."""
    return _hold_messages(_column_types(dataset, list(islice(dataset, _NUM_FIRST))))


def _hold_messages(columns: Mapping[str, str]) -> bool:
    return any(all(columns.get(column) == _ColumnType.LIST for column in group) for group in MESSAGE_COLUMNS)


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Return the columns of a dataset; for a stream that does not tell them, those of its first examples."""
    if dataset.column_names is not None and not _is_transformed(dataset):
        return list(dataset.column_names)
    return _names(list(islice(dataset, _NUM_FIRST)))


def in_one_column(dataset: IterableDataset) -> IterableDataset:
    """
    Return a stream with a single column, `EXAMPLE`, that holds each example whole.

    A stream need not tell its columns, and columns that appear later could not be removed by name.
    """
    return dataset.map(_in_one_column).select_columns([EXAMPLE])


def _in_one_column(example: Mapping[str, object]) -> dict[str, dict[str, object]]:
    return {EXAMPLE: dict(example)}


def check_is_dataset(dataset: object, name: str) -> Dataset | IterableDataset:
    """Return a dataset, or raise TRL's `TypeError` if it is something else."""
    if isinstance(dataset, Dataset | IterableDataset):
        return dataset
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


def _names(examples: Sequence[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for example in examples for name in example))


def _column_types(dataset: Dataset | IterableDataset, first: Sequence[Mapping[str, object]]) -> dict[str, _ColumnType]:
    features = _features(dataset)
    if features is None:
        return {name: _type_of_values(first, name) for name in _names(first)}
    names = dict.fromkeys(dataset.column_names or features)  # a format may hide some
    return {name: _type_of_feature(features[name], first, name) for name in names if name in features}


def _type_of_feature(feature: object, first: Sequence[Mapping[str, object]], name: str) -> _ColumnType:
    if isinstance(feature, List | LargeList | list):
        return _ColumnType.LIST
    if isinstance(feature, Value):
        return _ColumnType.TEXT if "string" in feature.dtype else _ColumnType.OTHER
    if isinstance(feature, dict):
        return _ColumnType.OTHER
    return _type_of_values(first, name)  # such as Json, which can be anything


def _type_of_values(first: Sequence[Mapping[str, object]], name: str) -> _ColumnType:
    values = [example.get(name) for example in first]
    if any(isinstance(value, list) for value in values):
        return _ColumnType.LIST
    return _ColumnType.TEXT if any(isinstance(value, str) for value in values) else _ColumnType.OTHER


def _is_text(columns: Mapping[str, str], text_field: str) -> bool:
    pair = {columns.get("prompt"), columns.get("completion")}
    return columns.get(text_field, _ColumnType.LIST) != _ColumnType.LIST or pair == {_ColumnType.TEXT}


def _expected(columns: Mapping[str, str], first: Sequence[Mapping[str, object]], text_field: str) -> str:
    lists = [name for name in columns if any(_looks_like_messages(example.get(name)) for example in first)]
    found = f" '{lists[0]}' looks like it: dataset.rename_column('{lists[0]}', 'messages')." if len(lists) == 1 else ""
    return f"{expected_columns(columns)}{found} Plain text is read from '{text_field}' (dataset_text_field)."


def _looks_like_messages(value: object) -> bool:
    keys = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}
    return bool({"role", "from"} & set(keys))


def _check_some_are_conversations(first: Sequence[Mapping[str, object]], name: str) -> None:
    """Raise before training begins if none of a stream's first examples can be read."""
    reasons = []
    for index, example in enumerate(first):
        try:
            if get_tokenized_turns(example) is None:
                for conversation in split_requests(example) or [example]:
                    Conversation.from_example(dict(conversation))
        except ValueError as error:
            reasons.append((index, str(error)))
    if len(reasons) == len(first):
        lines = "".join(f"\n- {error}" for error in group_errors(reasons))
        raise RenderingError(
            f"None of the first {count_of(len(first), 'row')} of the {name} dataset is a conversation:{lines}"
        )
