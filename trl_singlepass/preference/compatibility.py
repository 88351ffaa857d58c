"""What a dataset of preference pairs has to hold."""

from __future__ import annotations

from datasets import Dataset, IterableDataset

from ..data.dataset_format import check_is_dataset, column_names
from ..data.pairs import PAIR_COLUMNS, SIDES, TOKEN_COLUMNS


def check_dataset(dataset: Dataset | IterableDataset, name: str) -> None:
    """Refuse a dataset that holds no pairs."""
    columns = set(column_names(check_is_dataset(dataset, name)))
    if not any(set(expected) <= columns for expected in (SIDES, TOKEN_COLUMNS, PAIR_COLUMNS)):
        raise ValueError(
            f"The {name} dataset holds no pairs: expected the columns 'prompt', 'chosen' and 'rejected', or 'chosen' "
            f"and 'rejected' that begin alike, got {sorted(columns)}. Rename its columns. SinglePassSFTTrainer and "
            "`trl-singlepass train` take conversations."
        )
