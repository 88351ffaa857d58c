"""Some tokens of a row as a row of their own, whose other ancestors lie in memory: in plain integers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..trees.rows import Run, TreePlan
from .plan import Ranges


@dataclass(frozen=True, slots=True)
class Placement:
    """
    Where ranges of a row lie in another sequence of tokens.

    Args:
        ranges (`Ranges`):
            Half-open ranges of row positions, in row order.
        starts (`tuple[int, ...]`):
            For each range, the position of its first token in the other sequence.
    """

    ranges: Ranges
    starts: tuple[int, ...]

    @classmethod
    def one_after_the_other(cls, ranges: Iterable[tuple[int, int]]) -> Placement:
        """Return the placement of ranges that follow one another from position 0."""
        ranges = tuple(ranges)
        starts, total = [], 0
        for first, last in ranges:
            starts.append(total)
            total += last - first
        return cls(ranges, tuple(starts))

    def __len__(self) -> int:
        return self.starts[-1] + self.ranges[-1][1] - self.ranges[-1][0] if self.ranges else 0

    def of(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """
        Yield where a range of the row lies.

        Args:
            first (`int`):
                Row position of its first token.
            last (`int`):
                Row position just past its last token.

        Yields:
            `tuple[int, int]`: Half-open ranges of the other sequence.
        """
        index = bisect_right(self.ranges, first, key=lambda held: held[0]) - 1
        while first < last:
            start, end = self.ranges[index]
            assert start <= first < end, f"tokens [{first}, {last}) are not all in {self.ranges}"
            stop = min(last, end)
            yield self.starts[index] + first - start, self.starts[index] + stop - start
            first, index = stop, index + 1


def pass_plan(row: TreePlan, tokens: Placement, memory: Placement) -> TreePlan:
    """
    Return the plan of a forward over some tokens of a row.

    Args:
        row (`TreePlan`):
            Structure of the row.
        tokens (`Placement`):
            The tokens that run, in row order.
        memory (`Placement`):
            Tokens whose keys and values are in memory; every ancestor before the first running token is one.

    Returns:
        `TreePlan`: Positions below its length are running tokens, those above it are slots of the memory.
    """
    first_running, length = tokens.ranges[0][0], len(tokens)

    def path(ranges: Ranges) -> Iterator[tuple[int, int]]:
        for first, last in ranges:
            border = min(max(first, first_running), last)
            yield from ((length + start, length + end) for start, end in memory.of(first, border))
            yield from tokens.of(border, last)

    runs: list[Run] = []
    for (first, last), start in zip(tokens.ranges, tokens.starts, strict=True):
        for run in _overlapping(row.runs, first, last):
            begin, end = max(run.start, first), min(run.end, last)
            prefix = _joined(path((*run.prefix, (run.start, begin))))
            position, depth = start + begin - first, run.depth + begin - run.start
            _append(runs, Run(position, position + end - begin, depth, prefix))
    return TreePlan(length, tuple(runs))


def _overlapping(runs: Sequence[Run], first: int, last: int) -> Iterator[Run]:
    index = bisect_right(runs, first, key=lambda run: run.start) - 1
    while index < len(runs) and runs[index].start < last:
        yield runs[index]
        index += 1


def _joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges, with neighbours that touch made one."""
    joined: list[tuple[int, int]] = []
    for first, last in ranges:
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return tuple(joined)


def _append(runs: list[Run], run: Run) -> None:
    """Add a run, or lengthen the one before it where the new one continues its path."""
    if runs and run.prefix == _joined((*runs[-1].prefix, (runs[-1].start, runs[-1].end))):
        runs[-1] = replace(runs[-1], end=run.end)
    else:
        runs.append(run)
