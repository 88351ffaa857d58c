"""Conversations too large for one row: cut at turn borders into several rows that repeat as little as possible."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .prefix_tree import PrefixTree
from .radix import RadixNode, common_prefix_length
from .sample import Sample


def split_samples(samples: Sequence[Sample], max_row_tokens: int | None) -> list[list[Sample]]:
    """
    Cut the samples of a conversation into stretches whose trees fit a row each.

    Every row repeats the history that its turns need. Of all cuts between turns, the one with the fewest tokens is
    taken: with `size(i, j)` the tokens of the tree of turns `i` to `j`, dynamic programming over the turns finds

        tokens(j) = min over i with size(i, j) <= max_row_tokens of tokens(i - 1) + size(i, j)

    The loss of the rows together is the loss of the one tree: each sample stands in exactly one row.

    Args:
        samples (`Sequence[Sample]`):
            Samples in the order of their turns, none longer than `max_row_tokens`.
        max_row_tokens (`int`, *optional*):
            Largest tree, in tokens; `None` never cuts.

    Returns:
        `list[list[Sample]]`: The samples of each row.

    Raises:
        `ValueError`: If one sample alone is longer than a row.
    """
    longest = max(map(len, samples), default=0)
    if max_row_tokens is not None and longest > max_row_tokens:
        raise ValueError(
            f"A sample of {longest} tokens does not fit a row of max_row_tokens={max_row_tokens} and cannot be cut at "
            "a turn border. Shorten the samples first."
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
        root = RadixNode.root()
        for last in range(first, len(samples)):
            root.add(RadixNode.of_sample(samples[last], last))
            size = root.num_tokens
            if size > max_row_tokens:  # a tree only grows with its samples
                break
            if best[first] + size < best[last + 1]:
                best[last + 1], first_of[last + 1] = best[first] + size, first
    rows: list[list[Sample]] = []
    end = len(samples)
    while end > 0:
        rows.append(list(samples[first_of[end] : end]))
        end = first_of[end]
    return rows[::-1]


def fewest_tokens_possible(samples: Sequence[Sample], max_row_tokens: int) -> int:
    r"""
    Return a number of tokens below which no splitting can go, whichever samples share a row.

    Let `u_k` be the tokens of sample `k` that no other sample shares and `h_k` the others, made monotone from below
    (`h_k = min over m >= k of len(m) - u_m`). A row whose latest sample is `e` holds `h_e` shared tokens and
    has room for `max_row_tokens - h_e` unshared ones. All samples after `e` must stand in rows that end after `e`, so
    the ends that filling rows from the last turn backwards gives, a sample cut anywhere if need be, are the earliest
    that any splitting can have, one by one; and earlier ends share less. Hence

        tokens >= max(tokens of the tree, Σ u_k + Σ h_e over those ends)

    Args:
        samples (`Sequence[Sample]`):
            Samples in the order of their turns.
        max_row_tokens (`int`):
            Largest row, in tokens.

    Returns:
        `int`: The bound, the tokens of the unsplit tree included.
    """
    shared = np.array([_shared_length(sample, samples[:k], samples[k + 1 :]) for k, sample in enumerate(samples)])
    unshared = np.array([len(sample) for sample in samples]) - shared
    history = np.minimum.accumulate(shared[::-1])[::-1]
    total, last, left = int(unshared.sum()), len(samples) - 1, unshared.astype(np.int64)
    while last >= 0:
        total += int(history[last])
        room = max_row_tokens - int(history[last])
        while last >= 0 and room >= left[last]:
            room -= int(left[last])
            last -= 1
        if last >= 0:
            left[last] -= room
    return max(total, len(PrefixTree.from_samples(samples)))


def _shared_length(sample: Sample, earlier: Sequence[Sample], later: Sequence[Sample]) -> int:
    lengths = [common_prefix_length(sample.token_ids, other.token_ids) for other in (*earlier, *later)]
    return max(lengths, default=0)
