"""Turn conversations into plain text with a `formatting_func`."""

from __future__ import annotations

from collections.abc import Callable

from datasets import Dataset, IterableDataset
from transformers import logging
from trl import SFTConfig
from trl.data_utils import get_dataset_column_names


logger = logging.get_logger(__name__)


def format_as_text(
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
