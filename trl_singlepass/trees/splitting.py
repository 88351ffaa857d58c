"""Split conversations that are too large for one row between turns, repeating as few tokens as possible."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .prefix_tree import PrefixTree
from .radix import SampleMerger
from .sample import Sample


def split_samples(samples: Sequence[Sample], max_row_tokens: int | None) -> list[list[Sample]]:
    """
    Split the samples of a conversation so that the tree of each part fits into a row.

    Every row repeats the history that its turns need. Among all splits between turns, the one with the fewest tokens
    is taken. With `size(i, j)` the number of tokens in the tree of turns `i` to `j`, dynamic programming finds

        tokens(j) = min over i with size(i, j) <= max_row_tokens of tokens(i - 1) + size(i, j)

    With the prompts `[1, 2]`, `[1, 2, 3, 4]`, `[1, 2, 3, 4, 5]` and the completions `[8, 8, 8]`, `[8, 8, 8]`, `[6]`:

        size(0, 0) = 5      size(0, 1) = 10     size(0, 2) = 12
                            size(1, 1) = 7      size(1, 2) = 9
                                                size(2, 2) = 6

    Rows of at most 10 tokens hold turns 0 and 1, then 2, in 10 + 6 tokens, or turn 0, then 1 and 2, in 5 + 9: the
    latter is taken. Each sample stands in exactly one row, so the rows together have the loss of the one tree.

    `samples` are in the order of their turns. A sample longer than a row is a `ValueError`; `None` never splits.
    """
    longest = max(map(len, samples), default=0)
    if max_row_tokens is not None and longest > max_row_tokens:
        raise ValueError(
            f"A sample of {longest} tokens does not fit into a row of max_row_tokens={max_row_tokens}, and only "
            "conversations can be split, between turns. Shorten the samples first."
        )
    if max_row_tokens is None or sum(map(len, samples)) <= max_row_tokens:
        return [list(samples)]
    if len(PrefixTree.from_samples(samples)) <= max_row_tokens:
        return [list(samples)]
    return _fewest_tokens(samples, max_row_tokens)


def _fewest_tokens(samples: Sequence[Sample], max_row_tokens: int) -> list[list[Sample]]:
    best = [0] + [np.iinfo(np.int64).max] * len(samples)
    first_of = [0] * (len(samples) + 1)
    for first in range(len(samples)):
        merger = SampleMerger()
        for last in range(first, len(samples)):
            merger.add(samples[last], last)
            size = merger.num_tokens
            if size > max_row_tokens:  # further samples only make the tree larger
                break
            if best[first] + size < best[last + 1]:
                best[last + 1], first_of[last + 1] = best[first] + size, first
    rows: list[list[Sample]] = []
    end = len(samples)
    while end > 0:
        rows.append(list(samples[first_of[end] : end]))
        end = first_of[end]
    return rows[::-1]
