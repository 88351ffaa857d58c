"""The trainer's dataset: conversations become rows under its settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeAlias

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin, logging
from trl import SFTConfig
from trl.data_utils import get_dataset_column_names

from ..data.dataset_format import check_is_dataset, column_names, holds_messages, holds_rows, holds_turns
from ..data.preparation import prepare_dataset
from .compatibility import check_turn_settings
from .config import SinglePassSFTConfig


logger = logging.get_logger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset
FormattingFunction: TypeAlias = Callable[[dict[str, object]], str]
"""The user's function from an example of a dataset to plain text."""


def find_turns(
    dataset: AnyDataset, formatting_func: FormattingFunction | None, args: SFTConfig, name: str
) -> tuple[AnyDataset, FormattingFunction | None, bool]:
    """
    Return a dataset, the function that still has to format it, and whether it holds turns to train.

    Conversations with a `formatting_func` become text here: TRL would add the text to the messages, and train those.
    Datasets that a transform changes on the fly are left to TRL. `name` is what errors and the log call the dataset.
    """
    check_is_dataset(dataset, name)
    if holds_rows(column_names(dataset)):
        return dataset, formatting_func, True
    is_transformed = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
    if formatting_func is not None and not is_transformed and holds_messages(dataset):
        dataset, formatting_func = _format_as_text(dataset, formatting_func, args, name), None
    is_text = formatting_func is not None or is_transformed
    return (
        dataset,
        formatting_func,
        not is_text and holds_turns(dataset, text_field=args.dataset_text_field, name=name),
    )


def _format_as_text(
    dataset: Dataset | IterableDataset,
    formatting_func: Callable[[dict[str, object]], object],
    args: SFTConfig,
    name: str,
) -> Dataset | IterableDataset:
    """
    Return conversations as plain text, which TRL then tokenises and trains.

    TRL itself would add the text beside the messages and go on to train the messages.

    `args` tells the name of the text column and the number of processes. Raises `ValueError` if `formatting_func`
    returns anything but text.
    """
    logger.warning(
        f"formatting_func makes plain text of the conversations of the {name} dataset. They are trained as SFTTrainer "
        "trains text, on all of their tokens: a single pass over their turns needs the messages themselves, without "
        "formatting_func."
    )

    def format_example(example: dict[str, object]) -> dict[str, str]:
        text = formatting_func(example)
        if not isinstance(text, str):
            raise ValueError(
                f"formatting_func returned {type(text).__name__}, and text (str) was expected. To change messages, "
                "use dataset.map before the trainer, and leave formatting_func out."
            )
        return {args.dataset_text_field: text}

    options: dict[str, object] = {"remove_columns": get_dataset_column_names(dataset)}
    if isinstance(dataset, Dataset):
        options |= {"num_proc": args.dataset_num_proc, "desc": f"Applying formatting function to {name} dataset"}
    return dataset.map(format_example, **options)


def prepare_conversations(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    args: SFTConfig,
    *,
    packing: bool,
    name: str,
) -> AnyDataset:
    """
    Return a dataset of conversations as rows, shuffled if `shuffle_dataset` is set; rows stay as they are. With
    `packing`, several conversations share a row.
    """
    if holds_rows(column_names(dataset)):
        return dataset
    check_turn_settings(args, dataset, packing)
    if isinstance(dataset, IterableDataset) and args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)  # conversations take less memory in its buffer than rows
    with args.main_process_first(desc=f"preparing the {name} dataset"):
        rows = prepare_dataset(
            dataset,
            tokenizer,
            SinglePassSFTConfig.row_settings(args, packing),  # `args` may be TRL's own
            packing=packing,
            bad_rows=args.bad_rows,
            num_proc=args.dataset_num_proc,
            name=name,
            is_main_process=args.process_index == 0,
        )
    return rows.shuffle(seed=args.seed) if args.shuffle_dataset and isinstance(rows, Dataset) else rows


def needs_preparation(dataset: object) -> bool:
    """Whether a dataset is raw: neither rows of trees nor token ids, nor of a kind that only the user knows."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return False
    columns = column_names(dataset)
    return not holds_rows(columns) and "input_ids" not in columns


def in_order(args: SFTConfig) -> SFTConfig:
    """Return arguments that leave the examples of a dataset in their order."""
    args = copy.copy(args)
    args.shuffle_dataset = False
    return args
