"""Which rank computes which row: every step waits for the slowest rank, so each gets rows of the same cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from torch.utils.data import Sampler
from transformers import logging

from ..cost.flops import ModelShape
from .arrow import COST_COLUMNS


if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedConfig, TrainingArguments


logger = logging.get_logger(__name__)


# Steps whose rows are grouped by cost at once, as Hugging Face's group_by_length sorts 50 batches at once.
_GROUPED_STEPS = 50


def row_costs(
    num_tokens: NDArray[np.int64], num_pairs: NDArray[np.int64], config: PreTrainedConfig
) -> NDArray[np.float64]:
    """
    Return the predicted cost of rows, in the cost of one token without attention.

    Takes and returns shape `(num_rows,)`. `num_pairs` counts pairs of a token and one on its path, the token itself
    included. If the configuration lacks sizes that counting needs, a layer is assumed to have `12 · hidden_size²`
    weights.
    """
    text = config.get_text_config()
    if not isinstance(getattr(text, "intermediate_size", None), int):
        return np.asarray(num_tokens + num_pairs / (6 * text.hidden_size))
    shape = ModelShape.from_config(text)
    pairs = sum(
        num_pairs if window is None else np.minimum(num_pairs, window * num_tokens) for window in shape.windows
    )
    costs: NDArray[np.float64] = num_tokens + pairs * (4 * shape.attention_width / (2 * shape.matrix_parameters))
    return costs


def predicted_imbalance(
    order: Sequence[int], costs: NDArray[np.float64], *, batch_size: int, num_ranks: int, num_accumulated: int = 1
) -> float:
    """
    Return how much longer steps take than if all ranks had the same work: 0.1 for 10 % longer. That is the time of the
    slowest rank ÷ mean time of the ranks, over all complete steps, minus 1.

    For example, rows of cost 5, 1, 2, 2 on two ranks with one row per batch: two steps take 5 + 2 instead of 3 + 2, so
    the imbalance is 0.4. With two accumulated batches, one step takes 5 + 2 on the slower rank instead of 5.

    `order` holds the rows in the order of the sampler; the other arguments are those of [`BalancedSampler`].
    """
    step = batch_size * num_ranks * num_accumulated
    whole = len(order) // step * step
    if whole == 0:
        return 0.0
    batches = costs[np.asarray(order[:whole])].reshape(-1, num_accumulated, num_ranks, batch_size)
    per_rank = batches.sum(axis=(1, 3))
    return float(per_rank.max(axis=1).sum() / per_rank.mean(axis=1).sum() - 1)


def make_train_sampler(
    rows: Dataset | IterableDataset,
    args: TrainingArguments,
    accelerator: Accelerator,
    config: PreTrainedConfig,
    batch_size: int,
    epoch: Callable[[], int],
) -> BalancedSampler | None:
    """
    Return the sampler of a training set, and log how evenly the work will be divided among several ranks.

    `batch_size` is the number of rows per batch of a rank; `epoch` returns the number of the epoch that begins.

    There is one for `train_sampling_strategy="group_by_length"`, and for `"random"` on several ranks; `None` where
    Hugging Face's own sampler is right.
    """
    if not (isinstance(rows, Dataset) and set(COST_COLUMNS) <= set(rows.column_names)):
        return None
    is_grouped = args.train_sampling_strategy == "group_by_length"
    if not is_grouped and not (args.train_sampling_strategy == "random" and _deals_batches(accelerator)):
        return None
    columns = rows.select_columns(list(COST_COLUMNS)).with_format("numpy")[:]
    sampler = BalancedSampler(
        row_costs(columns["num_tokens"], columns["num_pairs"], config),
        batch_size=batch_size,
        num_ranks=accelerator.num_processes,
        num_accumulated=args.gradient_accumulation_steps,
        seed=args.seed if args.data_seed is None else args.data_seed,
        epoch=epoch,
        group_by_cost=is_grouped,
    )
    if accelerator.num_processes > 1:
        balanced, plain = (sampler.predicted_imbalance(balanced=is_balanced) for is_balanced in (True, False))
        logger.info(
            f"Predicted: steps take {balanced:.1%} longer than if all ranks had the same work ({plain:.1%} with rows "
            "dealt out as they come). More gradient accumulation, or packing, evens it out."
        )
    return sampler


def _deals_batches(accelerator: Accelerator) -> bool:
    """Return whether there are several ranks that take whole batches of the sampler in turn."""
    config, parallelism = accelerator.dataloader_config, accelerator.parallelism_config
    is_plain = parallelism is None or parallelism.non_data_parallel_size == 1
    return accelerator.num_processes > 1 and is_plain and not (config.split_batches or config.dispatch_batches)


class BalancedSampler(Sampler[int]):
    """
    Shuffled rows in an order that gives the ranks of a step the same work.

    Each step has the rows of a plain shuffle. Only the rank that computes a row is chosen, which does not change the
    statistics of training. With `group_by_cost`, steps also consist of rows of similar cost, as with Hugging Face's
    `group_by_length`. Every rank draws the same order and takes every `num_ranks`-th batch of it.

    `costs` has shape `(num_rows,)`; `batch_size` is rows per batch of a rank, `num_accumulated` batches per rank and
    step. `epoch` returns the number of the epoch that begins. The order depends on it and on the seed alone, so that a
    resumed run continues in the same order.
    """

    def __init__(
        self,
        costs: NDArray[np.float64],
        *,
        batch_size: int,
        num_ranks: int,
        num_accumulated: int,
        seed: int,
        epoch: Callable[[], int],
        group_by_cost: bool = False,
    ) -> None:
        self.costs = costs
        self.layout = {"batch_size": batch_size, "num_ranks": num_ranks, "num_accumulated": num_accumulated}
        self._seed, self._epoch, self._group_by_cost = seed, epoch, group_by_cost

    def __len__(self) -> int:
        return len(self.costs)

    def __iter__(self) -> Iterator[int]:
        yield from self.order(self._epoch())

    def order(self, epoch: int, *, balanced: bool = True) -> list[int]:
        """Return the rows in their order in an epoch, each once; without `balanced`, only shuffled."""
        generator = torch.Generator().manual_seed(self._seed + epoch)
        shuffled = torch.randperm(len(self.costs), generator=generator).numpy()
        if self._group_by_cost:
            shuffled = self._grouped(shuffled, generator)
        if not balanced or self.layout["num_ranks"] == 1:
            return [int(row) for row in shuffled]
        return [row for step in self._steps(shuffled) for row in self._balanced_step(step)]

    def predicted_imbalance(self, epoch: int = 0, *, balanced: bool = True) -> float:
        """Return [`predicted_imbalance`] of an epoch, with or without balancing."""
        return predicted_imbalance(self.order(epoch, balanced=balanced), self.costs, **self.layout)

    @property
    def _step_size(self) -> int:
        return int(np.prod(list(self.layout.values())))

    def _steps(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        return [rows[start : start + self._step_size] for start in range(0, len(rows), self._step_size)]

    def _grouped(self, shuffled: NDArray[np.int64], generator: torch.Generator) -> NDArray[np.int64]:
        """Sort the rows of many steps at once by cost and shuffle these steps; an incomplete last step stays last."""
        whole = len(shuffled) // self._step_size * self._step_size
        num_sorted = self._step_size * min(_GROUPED_STEPS, max(whole // self._step_size // 4, 1))
        grouped: list[NDArray[np.int64]] = []
        for start in range(0, whole, num_sorted):
            rows = shuffled[start : min(start + num_sorted, whole)]
            steps = self._steps(rows[np.argsort(-self.costs[rows], kind="stable")])
            grouped += [steps[i] for i in torch.randperm(len(steps), generator=generator)]
        return np.concatenate([*grouped, shuffled[whole:]])

    def _balanced_step(self, step: NDArray[np.int64]) -> list[int]:
        """Order the rows of a step batch by batch; batches go to the ranks in turn."""
        batch_size, num_ranks = self.layout["batch_size"], self.layout["num_ranks"]
        num_batches = len(step) // (batch_size * num_ranks)
        whole = num_batches * batch_size * num_ranks
        per_rank = [
            _most_costly_first(even_parts(rows, self.costs, num_batches), self.costs)
            for rows in even_parts(step[:whole].tolist(), self.costs, num_ranks)
        ]
        ordered = [row for batches in zip(*per_rank, strict=True) for batch in batches for row in batch]
        return [*ordered, *step[whole:].tolist()]


def even_parts(rows: Sequence[int], costs: NDArray[np.float64], num_parts: int) -> list[list[int]]:
    """
    Divide rows into parts of equal number and nearly equal cost.

    In each round, every part gets one of the most costly rows left, the cheapest part the most costly one. Then the
    most costly and the cheapest part exchange rows as long as that helps.

    For example, rows of cost 10, 9, 8, 3, 2, 1 in two parts: the first round gives 10 and 9, the second 10 + 3 and
    9 + 8, the third 10 + 3 + 2 and 9 + 8 + 1. No exchange brings 15 and 18 closer together.

    The number of rows is a multiple of `num_parts`. `costs` has the cost of each row of the dataset, `(num_rows,)`.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    totals = np.zeros(num_parts)
    ordered = sorted(rows, key=lambda row: -costs[row])
    for start in range(0, len(ordered), max(num_parts, 1)):
        for part, row in zip(np.argsort(totals, kind="stable"), ordered[start : start + num_parts], strict=True):
            parts[part].append(row)
            totals[part] += costs[row]
    for _ in range(4 * num_parts):
        if not _exchange(parts, totals, costs):
            break
    return parts


def _exchange(parts: list[list[int]], totals: NDArray[np.float64], costs: NDArray[np.float64]) -> bool:
    """Exchange the two rows that bring the most costly and the cheapest part closest together, if any do."""
    high, low = int(totals.argmax()), int(totals.argmin())
    gap = totals[high] - totals[low]
    moved = costs[parts[high]][:, None] - costs[parts[low]][None, :]
    left = np.abs(gap - 2 * moved)
    i, j = np.unravel_index(int(left.argmin()), left.shape) if left.size else (0, 0)
    if not left.size or left[i, j] >= gap * (1 - 1e-9):
        return False
    totals[high] -= moved[i, j]
    totals[low] += moved[i, j]
    parts[high][i], parts[low][j] = parts[low][j], parts[high][i]
    return True


def _most_costly_first(batches: list[list[int]], costs: NDArray[np.float64]) -> list[list[int]]:
    """Sort so that ranks run similar batches at the same time, and memory runs out early if it does at all."""
    return sorted(batches, key=lambda batch: -costs[batch].sum())
