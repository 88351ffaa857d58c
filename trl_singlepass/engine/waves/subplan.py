"""
Some tokens of a row as a row of their own, whose other ancestors are in a cache; in plain integers.

A row of 11 tokens has the trunk `[0, 7)`, the branch `[7, 9)` after token 3 and the branch `[9, 11)` after token 1:

    runs             [0, 7)          [7, 9) with ancestors [0, 4)     [9, 11) with ancestors [0, 2)

Tokens 0-3 ran before and have slots 0-3. The plan of the wave `[7, 11)` has length 4, so slot `s` is position `4 + s`:

    tokens           7  8  9 10
    positions        0  1  2  3
    runs             [0, 2) at depth 4 with ancestors [4, 8)          [2, 4) at depth 2 with ancestors [4, 6)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ...trees.rows import Ranges, Run, TreePlan, overlaps


@dataclass(frozen=True, slots=True)
class RangeMap:
    """Where ranges of a row are in another sequence of tokens."""

    ranges: Ranges  # half-open ranges of row positions, in row order
    starts: tuple[int, ...]  # for each range, the position of its first token in the other sequence

    @classmethod
    def consecutive(cls, ranges: Iterable[tuple[int, int]]) -> RangeMap:
        """Map ranges to a sequence in which they follow one another from position 0."""
        ranges = tuple(ranges)
        starts, total = [], 0
        for first, last in ranges:
            starts.append(total)
            total += last - first
        return cls(ranges, tuple(starts))

    def __len__(self) -> int:
        return self.starts[-1] + self.ranges[-1][1] - self.ranges[-1][0] if self.ranges else 0

    def locate(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """
        Yield where the range `[first, last)` of the row is, as half-open ranges of the other sequence.

        With `[0, 4)` and `[9, 11)` one after the other, `[10, 11)` is at `[5, 6)`.
        """
        index = bisect_right(self.ranges, first, key=lambda held: held[0]) - 1
        while first < last:
            start, end = self.ranges[index]
            assert start <= first < end, f"tokens [{first}, {last}) are not all in {self.ranges}"
            stop = min(last, end)
            yield self.starts[index] + first - start, self.starts[index] + stop - start
            first, index = stop, index + 1


def make_subplan(row: TreePlan, running: RangeMap, slots: RangeMap, length: int | None = None) -> TreePlan:
    """
    Return the plan of a forward over some tokens of a row.

    Positions below its length are running tokens, in row order, and the padding of one more chain up to `length`; the
    others are slots. Every ancestor before the first running token has a slot.
    """
    first_running, num_running = running.ranges[0][0], len(running)
    length = num_running if length is None else length

    def locate(ranges: Ranges) -> Iterator[tuple[int, int]]:
        for first, last in ranges:
            border = min(max(first, first_running), last)
            yield from ((length + start, length + end) for start, end in slots.locate(first, border))
            yield from running.locate(border, last)

    runs: list[Run] = []
    for (first, last), start in zip(running.ranges, running.starts, strict=True):
        for run in _overlapping(row.runs, first, last):
            begin, end = max(run.start, first), min(run.end, last)
            assert not run.is_image or end - begin == run.end - run.start, "an image that sees itself is not cut"
            prefix = _join(locate((*run.prefix, (run.start, begin))))
            position, depth = start + begin - first, run.depth + begin - run.start
            _append(runs, Run(position, position + end - begin, depth, prefix, run.is_image))
    if length > num_running:
        runs.append(Run(num_running, length, 0, ()))
    images = (place for image in overlaps(row.images, running.ranges) for place in running.locate(*image))
    return TreePlan(length, tuple(runs), images=tuple(images))


def _overlapping(runs: Sequence[Run], first: int, last: int) -> Iterator[Run]:
    index = bisect_right(runs, first, key=lambda run: run.start) - 1
    while index < len(runs) and runs[index].start < last:
        yield runs[index]
        index += 1


def _join(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Merge adjacent ranges."""
    joined: list[tuple[int, int]] = []
    for first, last in ranges:
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return tuple(joined)


def _append(runs: list[Run], run: Run) -> None:
    """Append a run, or extend the last one if the new one continues its path and neither is an image."""
    if (
        runs
        and not (run.is_image or runs[-1].is_image)
        and run.prefix == _join((*runs[-1].prefix, (runs[-1].start, runs[-1].end)))
    ):
        runs[-1] = replace(runs[-1], end=run.end)
    else:
        runs.append(run)
