"""`to_npass`: the samples that N-pass trains, for any trainer that takes tokens and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from trl.data_utils import get_dataset_column_names

from ..data.conversations import samples_of
from ..data.settings import RowSettings
from ..training.config import SinglePassSFTConfig
from ..trees.prefix_tree import IGNORE_INDEX
from ..trees.sample import Sample


_FEATURES = Features(
    {"input_ids": List(Value("int64")), "labels": List(Value("int64")), "loss_weights": List(Value("float64"))}
)


def to_npass(
    dataset: Dataset | IterableDataset | Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    args: SinglePassSFTConfig | None = None,
    *,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Expand conversations into the separate, already tokenised samples that [`SinglePassSFTTrainer`] trains in one pass.

    Any trainer that takes tokens and labels trains on them what the single pass trains, at N times the cost: it is the
    baseline to compare with, and a way out for trainers and models that have no single pass.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset`, `list`):
            Conversations, as [`SinglePassSFTTrainer`] takes them; in a list, also plain lists of messages.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        args ([`SinglePassSFTConfig`], *optional*):
            Arguments of the training run: what they say of lengths and weights holds for the samples.
        num_proc (`int`, *optional*):
            Number of processes.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: One row per turn, in the order of the conversations, with

        - `input_ids`: prompt and completion;
        - `labels`: the token at every place that is trained, -100 elsewhere (not shifted, as models expect them);
        - `loss_weights`: the factor of each token's loss, aligned with `labels`; left out where all of them are 1.

        A stream always has `loss_weights`. The loss of a step is `Σ weight · nll ÷ Σ weight`.

    Raises:
        `RenderingError`: If a row cannot be rendered without losing part of a turn.

    Example:

    ```python
    from trl import SFTTrainer
    from trl_singlepass import to_npass

    trainer = SFTTrainer(model, train_dataset=to_npass(dataset, tokenizer))
    ```
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        dataset = _as_dataset(dataset)
    settings = RowSettings() if args is None else args.row_settings()
    options: dict[str, Any] = {
        "batched": True,
        "batch_size": 1,
        "with_indices": True,
        "remove_columns": get_dataset_column_names(dataset),
        "fn_kwargs": {"tokenizer": tokenizer, "settings": settings},
        "features": _FEATURES,
    }
    if isinstance(dataset, IterableDataset):
        return dataset.map(_expand, **options)
    samples = dataset.map(_expand, num_proc=num_proc, desc="Expanding conversations into samples", **options)
    return samples if _has_other_weights(samples) else samples.remove_columns("loss_weights")


def _as_dataset(conversations: Sequence[Any]) -> Dataset:
    rows = [{"messages": row} if isinstance(row, list) else row for row in conversations]
    # `Dataset.from_list` takes the columns of the first row alone.
    columns = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})


def _expand(
    batch: dict[str, list[Any]], indices: list[int], tokenizer: PreTrainedTokenizerBase, settings: RowSettings
) -> dict[str, list[Any]]:
    """Expand a batch of one conversation."""
    row = {name: values[0] for name, values in batch.items()}
    samples = samples_of(row, indices[0], tokenizer, settings).samples
    return {
        "input_ids": [sample.token_ids.tolist() for sample in samples],
        "labels": [_labels(sample) for sample in samples],
        "loss_weights": [sample.loss_weights.tolist() for sample in samples],
    }


def _labels(sample: Sample) -> list[int]:
    labels: list[int] = np.where(sample.loss_weights > 0, sample.token_ids, IGNORE_INDEX).tolist()
    return labels


def _has_other_weights(samples: Dataset) -> bool:
    columns = samples.with_format("numpy", columns=["loss_weights"])
    return any(not np.isin(weights, (0, 1)).all() for batch in columns.iter(256) for weights in batch["loss_weights"])
