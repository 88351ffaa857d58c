"""The trainer's dataset: conversations become rows under its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin, logging
from trl import SFTConfig
from trl.data_utils import get_dataset_column_names

from ..data.dataset_format import check_is_dataset, column_names, holds_messages, holds_rows, holds_turns
from ..data.preparation import prepare_dataset
from .config import SinglePassSFTConfig
from .refusals import CONVERSATIONS, TURNS, check
from .situation import Situation


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
    has_turns = not is_text and holds_turns(dataset, text_field=args.dataset_text_field, name=name)
    return dataset, formatting_func, has_turns


def _format_as_text(dataset: AnyDataset, to_text: FormattingFunction, args: SFTConfig, name: str) -> AnyDataset:
    """Return conversations as plain text for TRL; a `formatting_func` that returns none raises `ValueError`."""
    logger.warning(
        f"formatting_func makes plain text of the conversations of the {name} dataset. They are trained as SFTTrainer "
        "trains text, on all of their tokens: a single pass over their turns needs the messages themselves, without "
        "formatting_func."
    )

    def format_example(example: dict[str, object]) -> dict[str, str]:
        text = to_text(example)
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
    """Return a dataset of conversations as rows, shuffled and packed if that is set; rows stay as they are."""
    if holds_rows(column_names(dataset)):
        return dataset
    check(Situation(args, dataset=dataset, packing=packing), TURNS, CONVERSATIONS)  # plain text follows all as in TRL
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
    is_known = isinstance(dataset, Dataset | IterableDataset)
    return is_known and not holds_rows(column_names(dataset)) and "input_ids" not in column_names(dataset)
