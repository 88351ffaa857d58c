"""`audit`: look at a sample of a dataset's rows, one by one, and sum up."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.utils.tqdm import tqdm

from ...cost.flops import shape_of
from ...data.bad_rows import group_errors
from .counts import Lengths, SharingByTurns, TurnStats
from .facts import RecipeReport
from .forecast import NPASS, SINGLE_PASS, ConversationCost, forecast
from .recipes import ASSISTANT_ONLY, LAST_TURN, RecipeCounts
from .report import AuditReport
from .tally import Auditor, Tally


DEFAULT_SAMPLE_SIZE = 500
_ROWS_AT_ONCE = 32  # that a process looks at before it tells what they hold


def audit(
    dataset: Iterable[Any],
    tokenizer: Any,
    model_config: Any = None,
    *,
    sample_size: int | None = None,
    seed: int = 0,
    max_length: int | None = None,
    chat_template: str | None = None,
    num_proc: int | None = None,
) -> AuditReport:
    """
    Look at what a dataset holds, what its chat template drops, and what training it would cost.

    Nothing is trained and no model is loaded. Rows that cannot be rendered are counted with their reason.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset`, `list`):
            Conversations, as [`SinglePassSFTTrainer`] takes them; in a list, also plain lists of messages.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        model_config (`transformers.PreTrainedConfig`, *optional*):
            Configuration of the model that will be trained, to count floating-point operations with. Without one,
            the forecast counts tokens, and attention pairs of one layer.
        sample_size (`int`, *optional*):
            Number of rows to look at, drawn at random; ratios then come with a 95 % confidence interval. 500 by
            default, or all rows if there are fewer. Of a stream, the first rows are taken.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        max_length (`int`, *optional*):
            Length in tokens to compare samples with; the model's `max_position_embeddings` by default.
        chat_template (`str`, *optional*):
            Template to use instead of the tokenizer's own.
        num_proc (`int`, *optional*):
            Number of processes that look at the rows. The report is the same.

    Returns:
        [`AuditReport`]: The report. `str()` of it is a table, `.findings` are sentences, `.to_dict()` is for JSON.

    Raises:
        `ValueError`: If the dataset is empty, the tokenizer has no chat template, or the operations of the model
            cannot be counted.

    Example:

    ```python
    from trl_singlepass import audit

    print(audit(dataset, tokenizer, model.config))
    ```
    """
    if chat_template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chat_template
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template, so conversations have no text. Pass chat_template.")
    if max_length is None:
        max_length = getattr(model_config and model_config.get_text_config(), "max_position_embeddings", None)
    shape, num_rows = shape_of(model_config), _length(dataset)
    rows, positions = _drawn(dataset, num_rows, DEFAULT_SAMPLE_SIZE if sample_size is None else sample_size, seed)
    if not positions:
        raise ValueError("Nothing to audit: the dataset is empty.")
    auditor = Auditor(tokenizer, shape)
    if num_proc is not None and num_proc > 1:
        tally = _tally_in_processes(auditor, rows, positions, num_proc)
    else:
        tally = _tally(auditor, rows, tqdm(positions, desc="Auditing conversations", unit=" rows"))
    return _report(tally, auditor, num_rows, max_length)


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _drawn(dataset: Any, num_rows: int | None, sample_size: int, seed: int) -> tuple[Any, list[int]]:
    """Something that holds the rows to look at, and their positions in it."""
    if sample_size < 1:
        raise ValueError(f"sample_size must be 1 or more, got {sample_size}.")
    if num_rows is None:
        rows = list(islice(dataset, sample_size))
        return rows, list(range(len(rows)))
    drawn = np.random.default_rng(seed).permutation(num_rows)[:sample_size]
    return dataset, np.sort(drawn).tolist()


def _tally(auditor: Auditor, rows: Any, positions: Iterable[int]) -> Tally:
    tally = Tally()
    for position in positions:
        row = rows[position]
        auditor.look_at(position, {"messages": row} if isinstance(row, list) else dict(row), tally)
    return tally


@dataclass(frozen=True, slots=True)
class _Packed:
    """Rows on their way to a process: `datasets` pickles in Python, which takes minutes for rows in memory."""

    rows: Any

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        return pickle.loads, (pickle.dumps(self.rows),)

    def __getitem__(self, position: int) -> Any:
        return self.rows[position]


def _tally_in_processes(auditor: Auditor, rows: Any, positions: list[int], num_proc: int) -> Tally:
    packed = _Packed(rows)
    parts = Dataset.from_dict({"position": positions}).map(
        lambda batch: {"tally": [pickle.dumps(_tally(auditor, packed, batch["position"]))]},
        batched=True,
        batch_size=_ROWS_AT_ONCE,
        writer_batch_size=1,
        remove_columns=["position"],
        num_proc=num_proc,
        new_fingerprint="audit",
        desc="Auditing conversations",
    )
    tally = Tally()
    for part in parts["tally"]:
        tally.merge(pickle.loads(part))
    return tally


def _report(tally: Tally, auditor: Auditor, num_rows: int | None, max_length: int | None) -> AuditReport:
    facts, sizes, costs = tally.turns, tally.sizes, tally.costs
    depth = max([*map(len, facts), *map(len, sizes)], default=0)
    coverage = 0.0 if num_rows is None else tally.num_rows / num_rows
    return AuditReport(
        num_rows=num_rows,
        num_audited=tally.num_rows,
        num_trainable=len(costs),
        errors=group_errors(tally.errors),
        templates=tuple(tally.templates.most_common()),
        all_turns=TurnStats.of(None, [f for row in facts for f in row], [s for row in sizes for s in row], max_length),
        by_turn=tuple(TurnStats.of(k + 1, _at(facts, k), _at(sizes, k), max_length) for k in range(depth)),
        max_length=max_length,
        sample_lengths=Lengths.of(size.length for row in sizes for size in row) if sizes else None,
        tree_lengths=Lengths.of(cost.by_schedule[SINGLE_PASS].tokens for cost in costs) if costs else None,
        num_chains=sum(cost.num_chains for cost in costs),
        sharing_by_turns=_sharing_by_turns(costs),
        recipes=_recipes(tally, auditor.recipe.refusal),
        forecast=forecast(costs, auditor.shape, coverage) if costs else None,
    )


def _at(rows: Sequence[Sequence[Any]], place: int) -> list[Any]:
    return [row[place] for row in rows if place < len(row)]


def _sharing_by_turns(costs: Sequence[ConversationCost]) -> tuple[SharingByTurns, ...]:
    groups: dict[int, list[ConversationCost]] = defaultdict(list)
    for cost in costs:
        groups[cost.num_turns].append(cost)
    return tuple(
        SharingByTurns(
            num_turns,
            len(group),
            sum(cost.by_schedule[NPASS].tokens for cost in group),
            sum(cost.by_schedule[SINGLE_PASS].tokens for cost in group),
        )
        for num_turns, group in sorted(groups.items())
    )


def _recipes(tally: Tally, refusal: str | None) -> tuple[RecipeReport, ...]:
    refusal = refusal or next(iter(tally.recipe_refusals), None)
    return (
        _recipe(ASSISTANT_ONLY, tally.assistant_only, refusal),
        _recipe(LAST_TURN, tally.last_turn, None),
    )


def _recipe(name: str, counts: Sequence[RecipeCounts], refusal: str | None) -> RecipeReport:
    fields = RecipeCounts.__dataclass_fields__
    return RecipeReport(name, len(counts), refusal, **{f: sum(getattr(count, f) for count in counts) for f in fields})
