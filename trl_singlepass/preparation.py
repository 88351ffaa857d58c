"""Datasets of conversations to datasets of rows: render, cut, merge; what is lost on the way is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, logging
from trl import is_conversational
from trl.data_utils import get_dataset_column_names, is_conversational_from_value

from .rendering import render_row
from .rows import ROW_COLUMNS, Row
from .sample import Sample
from .tree import PrefixTree


logger = logging.get_logger(__name__)

LOSS_COLUMNS = ("num_turns", "num_cut_turns", "num_dropped_turns", "num_cut_tokens")


@dataclass(frozen=True, slots=True)
class PreparationReport:
    """
    What a dataset held and what of it is not trained.

    Args:
        num_conversations (`int`):
            Conversations given.
        num_turns (`int`):
            Turns given.
        num_cut_turns (`int`):
            Turns that lost tokens to `max_length` and are trained on the rest.
        num_dropped_turns (`int`):
            Turns whose prompt alone fills `max_length`, so that nothing of them is trained.
        num_cut_tokens (`int`):
            Tokens of completions that are not trained.
        num_dropped_conversations (`int`):
            Conversations of which no turn is trained.
    """

    num_conversations: int
    num_turns: int
    num_cut_turns: int
    num_dropped_turns: int
    num_cut_tokens: int
    num_dropped_conversations: int

    @property
    def is_complete(self) -> bool:
        """Whether every token of every turn is trained."""
        return self.num_cut_tokens == 0

    def __str__(self) -> str:
        return (
            f"{self.num_turns} turns of {self.num_conversations} conversations; not trained: "
            f"{self.num_cut_tokens} completion tokens past max_length, in {self.num_cut_turns} turns that are trained "
            f"in part and {self.num_dropped_turns} turns dropped whole ({self.num_dropped_conversations} "
            "conversations dropped whole)"
        )


def holds_conversations(example: Mapping[str, Any]) -> bool:
    """
    Return whether a dataset row is a conversation, whose turns one pass can train.

    Args:
        example (`Mapping[str, Any]`):
            First row of a dataset.

    Returns:
        `bool`: `True` for `messages`, conversational `prompt` + `completion`, and ShareGPT `conversations`; `False`
        for plain text and tokenised rows, which stock `SFTTrainer` trains as they are.
    """
    if "input_ids" in example:
        return False
    return bool(is_conversational(example) or is_conversational_from_value(example))


def holds_rows(column_names: list[str]) -> bool:
    """Return whether a dataset with these columns has already been prepared."""
    return set(ROW_COLUMNS) <= set(column_names)


def prepare_example(
    example: dict[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> dict[str, Any]:
    """
    Return one conversation as a row of its prefix tree, with counts of what `max_length` took.

    Args:
        example (`dict[str, Any]`):
            Dataset row.
        index (`int`):
            Its index, for error messages.
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        max_length (`int`, *optional*):
            Longest sample, in tokens.

    Returns:
        `dict[str, Any]`: Columns `ROW_COLUMNS` (empty if no turn is trained) and `LOSS_COLUMNS`.

    Raises:
        `RenderingError`: If the row cannot be rendered without losing part of a turn.
    """
    samples = render_row(example, tokenizer, row_index=index)
    kept = [sample if max_length is None else sample.truncated(max_length) for sample in samples]
    trained = [sample for sample in kept if sample.is_trained]
    counts = _losses(samples, kept)
    if not trained:
        return {**{name: [] for name in ROW_COLUMNS}, **counts}
    return {**Row.from_tree(PrefixTree.from_samples(trained)).columns(), **counts}


def _losses(samples: list[Sample], kept: list[Sample]) -> dict[str, int]:
    lost = [int((s.loss_weights > 0).sum() - (k.loss_weights > 0).sum()) for s, k in zip(samples, kept, strict=True)]
    dropped = [not sample.is_trained for sample in kept]
    return {
        "num_turns": len(samples),
        "num_cut_turns": sum(tokens > 0 and not drop for tokens, drop in zip(lost, dropped, strict=True)),
        "num_dropped_turns": sum(dropped),
        "num_cut_tokens": sum(lost),
    }


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset | IterableDataset, PreparationReport | None]:
    """
    Return a dataset of conversations as a dataset of rows.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset`):
            Conversations.
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        max_length (`int`, *optional*):
            Longest sample, in tokens.
        num_proc (`int`, *optional*):
            Number of processes; a streamed dataset is prepared on the fly.
        name (`str`, *optional*, defaults to `"train"`):
            Name of the dataset for the progress bar.

    Returns:
        `tuple`: The rows, and what they lost. A streamed dataset has no report yet; its rows keep `LOSS_COLUMNS`.

    Raises:
        `RenderingError`: If a row cannot be rendered without losing part of a turn.
        `ValueError`: If no turn of the dataset is trained.
    """
    kwargs: dict[str, Any] = {"fn_kwargs": {"tokenizer": tokenizer, "max_length": max_length}, "with_indices": True}
    columns = get_dataset_column_names(dataset)
    if isinstance(dataset, IterableDataset):
        rows = dataset.map(prepare_example, remove_columns=columns, **kwargs)
        return rows.filter(_is_trained_or_warn, with_indices=True).remove_columns(list(LOSS_COLUMNS)), None
    rows = dataset.map(
        prepare_example,
        remove_columns=columns,
        num_proc=num_proc,
        desc=f"Building prefix trees of {name} dataset",
        **kwargs,
    )
    trained = rows.filter(
        _is_trained, input_columns="input_ids", num_proc=num_proc, desc=f"Dropping untrained rows of {name} dataset"
    )
    report = _report({name: rows[name] for name in LOSS_COLUMNS}, len(trained))
    if len(trained) == 0:
        raise ValueError(f"No turn of the {name} dataset is trained: {report}. Raise max_length, or set it to None.")
    return trained.remove_columns(list(LOSS_COLUMNS)), report


def _is_trained(input_ids: list[int]) -> bool:
    return len(input_ids) > 0


def _is_trained_or_warn(row: dict[str, Any], index: int) -> bool:
    """A stream has no end at which losses could be summed up, so each is named as it comes."""
    is_trained = _is_trained(row["input_ids"])
    report = _report({name: [row[name]] for name in LOSS_COLUMNS}, int(is_trained))
    if not report.is_complete:
        logger.warning(f"Row {index} of the stream: {report}.")
    return is_trained


def _report(counts: Mapping[str, Sequence[int]], num_trained: int) -> PreparationReport:
    num_conversations = len(counts["num_turns"])
    return PreparationReport(
        num_conversations=num_conversations,
        num_dropped_conversations=num_conversations - num_trained,
        **{name: sum(counts[name]) for name in LOSS_COLUMNS},
    )
