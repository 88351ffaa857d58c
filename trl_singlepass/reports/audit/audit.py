"""`audit`: look at a random sample of a dataset's rows and sum up what they contain."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
from datasets.utils.tqdm import tqdm
from transformers import ProcessorMixin

from ...cost.flops import get_model_shape
from ...data.bad_rows import group_errors
from ...data.images import holds_images
from ...data.vision import check_renders
from .counts import Lengths, TurnStats
from .forecast import Schedule, make_forecast, sharing_by_turns
from .recipes import Recipe, RecipeReport
from .report import AuditReport
from .tally import Auditor, Tally


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from ...rendering.conversation import Message

    Rows: TypeAlias = Dataset | Sequence[Mapping[str, object] | list[Message]]

T = TypeVar("T")

DEFAULT_SAMPLE_SIZE = 500
_BATCH_SIZE = 32  # rows that a process audits before it reports back


def audit(
    dataset: Rows | IterableDataset,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    model_config: PreTrainedConfig | None = None,
    *,
    sample_size: int | None = None,
    seed: int = 0,
    max_length: int | None = None,
    chat_template: str | None = None,
    num_proc: int | None = None,
) -> AuditReport:
    """
    Report what a dataset contains, what its chat template drops, and what training on it would cost.

    Nothing is trained and no model is loaded. Rows that cannot be rendered are counted, with the reason.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or `list`):
            Conversations, as [`SinglePassSFTTrainer`] takes them; a list may also hold plain lists of messages. Of
            preference pairs, each trajectory is reported, and what the turns of both share in one tree.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Tokenizer with a chat template; the processor for conversations with images.
        model_config (`transformers.PreTrainedConfig`, *optional*):
            Configuration of the model to train, to count floating-point operations. Without it, the forecast counts
            tokens, and attention pairs of one layer.
        sample_size (`int`, *optional*):
            Number of rows to draw at random; ratios then come with a 95 % confidence interval. Defaults to 500, or to
            all rows if there are fewer. A stream is not sampled: its first rows are taken.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        max_length (`int`, *optional*):
            Length in tokens to compare samples with. Defaults to the model's `max_position_embeddings`.
        chat_template (`str`, *optional*):
            Template to use instead of the tokenizer's own.
        num_proc (`int`, *optional*):
            Number of processes. The report does not depend on it.

    Returns:
        [`AuditReport`]: `str()` of it is a table, `.findings` are sentences, `.to_dict()` is for JSON.

    Raises:
        `ValueError`: If the dataset is empty, the tokenizer has no chat template, or the operations of the model
            cannot be counted.

    Example:

    ```python
    print(audit(dataset, tokenizer, model.config))
    ```
    """
    if max_length is None and model_config is not None:
        max_length = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    num_rows = len(dataset) if hasattr(dataset, "__len__") else None
    tokenizer = _with_template(tokenizer, chat_template)
    if isinstance(tokenizer, ProcessorMixin) and not holds_images(dataset):
        tokenizer = tokenizer.tokenizer
    auditor = Auditor(tokenizer, get_model_shape(model_config))
    rows, positions = _draw(dataset, num_rows, DEFAULT_SAMPLE_SIZE if sample_size is None else sample_size, seed)
    if not positions:
        raise ValueError("Nothing to audit: the dataset is empty.")
    tally = _audit_positions(auditor, rows, positions, num_proc or 1)
    return _make_report(tally, auditor, num_rows, max_length)


def _with_template(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin, chat_template: str | None
) -> PreTrainedTokenizerBase | ProcessorMixin:
    if isinstance(tokenizer, ProcessorMixin):
        processor = copy.copy(tokenizer)
        processor.tokenizer = _with_template(tokenizer.tokenizer, chat_template or tokenizer.chat_template)
        processor.chat_template = processor.tokenizer.chat_template
        return processor
    check_renders(tokenizer)
    if chat_template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chat_template
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template to render conversations with. Pass chat_template.")
    return tokenizer


def _draw(
    dataset: Rows | IterableDataset, num_rows: int | None, sample_size: int, seed: int
) -> tuple[Rows, list[int]]:
    """Return rows, and the positions of those to audit."""
    if sample_size < 1:
        raise ValueError(f"sample_size must be 1 or more, got {sample_size}.")
    if num_rows is None:
        rows = list(islice(dataset, sample_size))
        return rows, list(range(len(rows)))
    drawn = np.random.default_rng(seed).permutation(num_rows)[:sample_size]
    return dataset, np.sort(drawn).tolist()


def _audit_positions(auditor: Auditor, rows: Rows, positions: list[int], num_proc: int) -> Tally:
    tally = Tally()
    with tqdm(total=len(positions), desc="Auditing conversations", unit=" rows") as bar:
        for part in _audit_batches(auditor, rows, positions, num_proc):
            tally.merge(part)
            bar.update(part.num_rows)
    return tally


def _audit_batches(auditor: Auditor, rows: Rows, positions: list[int], num_proc: int) -> Iterator[Tally]:
    """Yield tallies in the order of the rows, so that the report does not depend on the number of processes."""
    if num_proc == 1:
        for position in positions:
            yield _audit_rows(auditor, rows, [position])
        return
    batches = [positions[start : start + _BATCH_SIZE] for start in range(0, len(positions), _BATCH_SIZE)]
    with (
        _without_tokenizer_threads(),
        ProcessPoolExecutor(num_proc, initializer=_start_worker, initargs=(auditor, rows)) as pool,
    ):
        yield from pool.map(_audit_in_worker, batches)


def _audit_rows(auditor: Auditor, rows: Rows, positions: Sequence[int]) -> Tally:
    tally = Tally()
    for position in positions:
        row = rows[position]
        auditor.add_row(position, {"messages": row} if isinstance(row, list) else row, tally)
    return tally


# A worker gets auditor and rows once: as arguments, they would be pickled again for every batch.
_worker: list[tuple[Auditor, Rows]] = []


def _start_worker(auditor: Auditor, rows: Rows) -> None:
    _worker[:] = [(auditor, rows)]


def _audit_in_worker(positions: list[int]) -> Tally:
    return _audit_rows(*_worker[0], positions)


@contextmanager
def _without_tokenizer_threads() -> Iterator[None]:
    """Tokenizers that have used threads warn in every process forked from theirs, unless told not to use any."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _make_report(tally: Tally, auditor: Auditor, num_rows: int | None, max_length: int | None) -> AuditReport:
    facts, sizes, costs = tally.turns, tally.sizes, tally.costs
    depth = max([*map(len, facts), *map(len, sizes)], default=0)
    coverage = 0.0 if num_rows is None else tally.num_rows / num_rows
    refusal = auditor.recipe.refusal or next(iter(tally.recipe_refusals), None)
    return AuditReport(
        num_rows=num_rows,
        num_audited=tally.num_rows,
        num_trainable=len(costs),
        errors=group_errors(tally.errors),
        templates=tuple(tally.templates.most_common()),
        all_turns=TurnStats.from_turns(None, _flatten(facts), _flatten(sizes), max_length),
        by_turn=tuple(TurnStats.from_turns(k + 1, _at(facts, k), _at(sizes, k), max_length) for k in range(depth)),
        max_length=max_length,
        sample_lengths=Lengths.from_values(size.length for size in _flatten(sizes)) if sizes else None,
        tree_lengths=Lengths.from_values(c.by_schedule[Schedule.SINGLE_PASS].tokens for c in costs) if costs else None,
        num_chains=sum(cost.num_chains for cost in costs),
        sharing_by_turns=sharing_by_turns(costs),
        recipes=(
            RecipeReport.from_counts(Recipe.ASSISTANT_ONLY, tally.assistant_only, refusal),
            RecipeReport.from_counts(Recipe.LAST_TURN, tally.last_turn, None),
        ),
        forecast=make_forecast(costs, auditor.shape, coverage) if costs else None,
    )


def _flatten(rows: Sequence[Sequence[T]]) -> list[T]:
    return [item for row in rows for item in row]


def _at(rows: Sequence[Sequence[T]], place: int) -> list[T]:
    return [row[place] for row in rows if place < len(row)]
