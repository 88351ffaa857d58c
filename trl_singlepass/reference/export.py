"""`to_npass`: the samples that N-pass trains, for any trainer that takes tokens and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase, ProcessorMixin, logging

from ..data.bad_rows import (
    BadRowError,
    BadRows,
    RowErrors,
    StreamedBadRows,
    bad_rows_error,
    describe_dropped,
    get_reason,
    group_errors,
)
from ..data.conversations import example_to_samples
from ..data.dataset_format import EXAMPLE, check_is_dataset, column_names, in_one_column
from ..data.images import undecoded
from ..data.reader import get_tokenizer, reader_for
from ..data.settings import RowSettings
from ..data.tokenized_turns import gather_turns, is_single_turn
from ..rendering.conversation import Message
from ..training.config import SinglePassSFTConfig
from ..trees.image_features import shown_images
from ..trees.prefix_tree import IGNORE_INDEX
from ..trees.sample import Sample


logger = logging.get_logger(__name__)

_FEATURES = Features(
    {"input_ids": List(Value("int64")), "labels": List(Value("int64")), "loss_weights": List(Value("float64"))}
)
_TEXT_FEATURES = Features({"prompt": Value("string"), "completion": Value("string"), "images": List(Image())})
_WAY_OUT = "Export messages, with max_length=None and without weights, or train in a single pass"
_ONE_BY_ONE: dict[str, Any] = {"batched": True, "batch_size": 1, "with_indices": True}
_BAD_ROW = {"row": Value("int64"), "bad_row": Value("string")}


def to_npass(
    dataset: Dataset | IterableDataset | Sequence[Mapping[str, object] | list[Message]],
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    args: SinglePassSFTConfig | None = None,
    *,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Expand conversations into the separate, tokenized samples that [`SinglePassSFTTrainer`] trains in one pass.

    Any trainer that takes tokens and labels learns from them what the single pass learns, at the cost of N-pass. They
    are the baseline for comparisons, and the way out for trainers and models without a single pass.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or `list`):
            Conversations, as [`SinglePassSFTTrainer`] takes them; a list may also hold plain lists of messages.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Tokenizer with a chat template; the processor for conversations with images.
        args ([`SinglePassSFTConfig`], *optional*):
            Training arguments, whose settings for lengths, weights and bad rows apply to the samples.
        num_proc (`int`, *optional*):
            Number of processes.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: One row per turn, in the order of the conversations, with

        - `input_ids`: prompt and completion;
        - `labels`: each trained token at its own position, -100 elsewhere (not shifted, as models expect);
        - `loss_weights`: weight of each token's loss, aligned with `labels`; left out if all are 1, except in streams.

        The loss of a step is `Σ weight · nll ÷ Σ weight`.

        Trainers process images together with text. So conversations with images become rows of text: `prompt` and
        `completion`, rendered, and `images`, those that the prompt shows.

    Raises:
        `RenderingError`: If some rows cannot be rendered in full, or those with images cannot be written as text,
            unless `args.bad_rows` is `"drop"`.

    Example:

    ```python
    trainer = SFTTrainer(model, train_dataset=to_npass(dataset, tokenizer))
    ```
    """
    if isinstance(dataset, Sequence):
        rows = [{"messages": row} if isinstance(row, list) else row for row in dataset]
        # `Dataset.from_list` would take the columns of the first row only.
        columns = dict.fromkeys(name for row in rows for name in row)
        dataset = Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    check_is_dataset(dataset, "train")
    settings = RowSettings() if args is None else args.row_settings()
    bad_rows: BadRows = BadRows.ERROR if args is None else args.bad_rows
    if is_single_turn(column_names(dataset)):
        dataset, errors = gather_turns(dataset, len(get_tokenizer(tokenizer)), bad_rows=bad_rows, num_proc=num_proc)
        _log_dropped(errors)
    tokenizer = reader_for(dataset, tokenizer)
    if isinstance(dataset, IterableDataset):
        expand, features = _StreamExpansion(tokenizer, settings, bad_rows), _features(tokenizer)
        return in_one_column(dataset).map(expand, remove_columns=[EXAMPLE], features=features, **_ONE_BY_ONE)
    samples = (undecoded(dataset) if isinstance(tokenizer, ProcessorMixin) else dataset).map(
        _expand_or_explain,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        features=Features({**_features(tokenizer), **_BAD_ROW}),
        fn_kwargs={"tokenizer": tokenizer, "settings": settings},
        desc="Expanding conversations into samples",
        **_ONE_BY_ONE,
    )
    samples = _without_bad_rows(samples, len(dataset), bad_rows)
    if "loss_weights" not in samples.column_names:
        return samples
    weights = samples.with_format("numpy", columns=["loss_weights"])
    if any(not np.isin(some, (0, 1)).all() for batch in weights.iter(256) for some in batch["loss_weights"]):
        return samples
    return samples.remove_columns("loss_weights")


def _features(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> Features:
    return _TEXT_FEATURES if isinstance(tokenizer, ProcessorMixin) else _FEATURES


def _without_bad_rows(samples: Dataset, num_rows: int, bad_rows: BadRows) -> Dataset:
    reasons = zip(samples["row"], samples["bad_row"], strict=True)
    errors = group_errors((row, reason) for row, reason in reasons if reason is not None)
    if errors and bad_rows == BadRows.ERROR:
        raise bad_rows_error(errors, num_rows, "given")
    _log_dropped(errors)
    kept = [index for index, reason in enumerate(samples["bad_row"]) if reason is None]
    return (samples.select(kept) if errors else samples).remove_columns(list(_BAD_ROW))


def _log_dropped(errors: Sequence[RowErrors]) -> None:
    if errors:
        logger.warning(f"N-pass export: {describe_dropped(errors)}.")


def _expand_or_explain(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    settings: RowSettings,
) -> dict[str, list[Any]]:
    """Expand a batch of one conversation, or give the reason why it cannot be trained."""
    try:
        row = {name: values[0] for name, values in batch.items()}
        expanded = _expand(row, indices[0], tokenizer, settings)
    except BadRowError as error:
        nothing = {name: [None] for name in _features(tokenizer)}
        return {**nothing, "row": indices, "bad_row": [get_reason(error, indices[0])]}
    num_samples = len(next(iter(expanded.values())))
    return {**expanded, "row": indices * num_samples, "bad_row": [None] * num_samples}


class _StreamExpansion:
    """Expands a stream, batch by batch of one conversation."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, settings: RowSettings, bad_rows: BadRows
    ) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._bad_rows = StreamedBadRows(bad_rows, "given")

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        (row,) = batch[EXAMPLE]
        try:
            return _expand(row, indices[0], self._tokenizer, self._settings)
        except BadRowError as error:
            self._bad_rows.add(indices[0], row, error)
            return {name: [] for name in _features(self._tokenizer)}


def _expand(
    row: dict[str, Any], index: int, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, settings: RowSettings
) -> dict[str, list[Any]]:
    samples = example_to_samples(row, index, tokenizer, settings).samples
    if isinstance(tokenizer, ProcessorMixin):
        return _as_text(samples, tokenizer)
    return {
        "input_ids": [sample.token_ids.tolist() for sample in samples],
        "labels": [np.where(sample.loss_weights > 0, sample.token_ids, IGNORE_INDEX).tolist() for sample in samples],
        "loss_weights": [sample.loss_weights.tolist() for sample in samples],
    }


# Samples with images -------------------------------------------------------------------------------------------------


def _as_text(samples: Sequence[Sample], processor: ProcessorMixin) -> dict[str, list[Any]]:
    """Return samples as prompts, completions and images; `BadRowError` for what would not train the same as text."""
    texts = [_text(sample, processor) for sample in samples]
    return {
        "prompt": [prompt for prompt, _ in texts],
        "completion": [completion for _, completion in texts],
        "images": [
            [
                {"path": image.source["path"], "bytes": image.source["bytes"]}
                for image in shown_images(sample.image_features, sample.images)
            ]
            for sample in samples
        ],
    }


def _text(sample: Sample, processor: ProcessorMixin) -> tuple[str, str]:
    where = f"Message {sample.message_index} cannot be written as text for a trainer that processes images"
    if sample.text is None:
        raise BadRowError(f"{where}: it is given as tokens, or cut by max_length. {_WAY_OUT}.")
    start = sample.prompt_length
    if not (np.isin(sample.loss_weights[start:], 1).all() and not sample.loss_weights[:start].any()):
        raise BadRowError(f"{where}: its loss weights are not all 1. {_WAY_OUT}.")
    completion = processor.tokenizer(sample.text[1], add_special_tokens=False)["input_ids"]
    if not np.array_equal(completion, sample.token_ids[start:]):
        raise BadRowError(f"{where}: its completion has other tokens alone than after its prompt. {_WAY_OUT}.")
    return sample.text
