"""
Split a row into waves: which of its tokens have activations at the same time, in plain integers.

A row of 11 tokens has the trunk `[0, 7)`, the branch `[7, 9)` after token 3 and the branch `[9, 11)` after token 1.
Its history, up to the last fork, is `[0, 4)`; `[4, 7)` is a branch like the others.

    wave_tokens    waves                                     tokens with activations
    11             [0, 11)                                   11
    8              [0, 4) kept    [4, 7)    [7, 11)          4, then 4 + 4, then 4 + 3
    5              [0, 4)         [4, 9)    [9, 11)          4 without backward, then 2, 5 and 4

With 5, the history does not fit beside the longest branch. Its four tokens run twice: forward first, so that the
branches find their keys and values, and forward and backward last.

A wave is a row of its own, whose other ancestors are in a cache (`make_subplan`). Here tokens 0-3 ran before and have
slots 0-3. The plan of the wave `[7, 11)` has length 4, so slot `s` is position `4 + s`:

    runs of the row  [0, 7)          [7, 9) with ancestors [0, 4)     [9, 11) with ancestors [0, 2)
    tokens           7  8  9 10
    positions        0  1  2  3
    runs             [0, 2) at depth 4 with ancestors [4, 8)          [2, 4) at depth 2 with ancestors [4, 6)
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..trees.rows import Ranges, Run, TreePlan, overlaps


@dataclass(frozen=True, slots=True)
class Wave:
    """Consecutive tokens of a row that run together; ancestors of a token are in its wave or an earlier one."""

    start: int  # position of the first token in the row
    end: int  # just past the last token
    # Half-open ranges of the tokens that have descendants in later waves, in the order of their depth.
    handed_on: Ranges
    # Whether it runs once and its activations stay until all its descendants are done. If not, the tokens that are
    # handed on run a second time.
    is_kept: bool = False

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def num_handed_on(self) -> int:
        """Number of tokens that have descendants in later waves."""
        return sum(end - start for start, end in self.handed_on)


@dataclass(frozen=True, slots=True)
class WavePlan:
    """The waves of a row."""

    row: TreePlan
    # Waves in row order, grouped so that no token has an ancestor in another group.
    groups: tuple[tuple[Wave, ...], ...]

    @classmethod
    def from_tree_plan(
        cls,
        row: TreePlan,
        wave_tokens: int,
        *,
        keep_history: bool = True,
        smallest_wave: int = 1,
        allow_single_tokens: bool = True,
        cut_images: bool = True,
    ) -> WavePlan:
        """
        Split a row into waves, so that at most `wave_tokens` have activations at the same time.

        Trees that fit run whole, several together. If a tree does not fit, with `keep_history`, its history is kept
        where it fits beside any single branch and leaves room for `smallest_wave` tokens, and branches run in waves of
        what is left. Otherwise both are split. Unless `allow_single_tokens`, a wave of a single token joins a
        neighbour, which then has up to two tokens more. Unless `cut_images`, a wave ends before an image that it would
        cut; one that is longer than a wave has a wave of its own.
        """
        groups: list[tuple[Wave, ...]] = []
        together: list[tuple[int, int]] = []  # trees that fit into one wave so far
        for runs in _trees(row):
            start, end = runs[0].start, runs[-1].end
            if together and end - together[0][0] > wave_tokens:
                groups.append((_make_wave(row, together[0][0], together[-1][1]),))
                together = []
            if end - start <= wave_tokens:
                together.append((start, end))
                continue
            whole = () if cut_images else row.images
            groups.append(tuple(_waves_of_tree(row, runs, wave_tokens, keep_history, smallest_wave, whole)))
        if together:
            groups.append((_make_wave(row, together[0][0], together[-1][1]),))
        return cls(row, tuple(groups) if allow_single_tokens else tuple(_without_single_tokens(row, groups)))

    @property
    def waves(self) -> tuple[Wave, ...]:
        """All waves, in row order."""
        return tuple(wave for group in self.groups for wave in group)

    @property
    def num_repeated(self) -> int:
        """Number of tokens that run twice, the first time forward only."""
        return sum(wave.num_handed_on for wave in self.waves if not wave.is_kept)

    @property
    def peak_tokens(self) -> int:
        """Largest number of tokens that have activations at the same time."""
        kept = (len(group[0]) if group[0].is_kept else 0 for group in self.groups)
        others = (max((len(wave) for wave in group if not wave.is_kept), default=0) for group in self.groups)
        return max(map(sum, zip(kept, others, strict=True)))

    @property
    def cached_tokens(self) -> int:
        """Largest number of tokens whose keys and values wait for later waves."""
        return max(sum(wave.num_handed_on for wave in group) for group in self.groups)

    def __str__(self) -> str:
        waves = self.waves
        if len(waves) == 1:
            return f"one wave of {self.row.length} tokens"
        kept = sum(len(wave) for wave in waves if wave.is_kept)
        return (
            f"{len(waves)} waves for {self.row.length} tokens, at most {self.peak_tokens} of them alive; history of "
            f"{kept} tokens kept, {self.num_repeated} tokens run twice"
        )


def _trees(row: TreePlan) -> Iterator[list[Run]]:
    """Yield the runs of each tree of a row."""
    tree: list[Run] = []
    for run in row.runs:
        if tree and not run.prefix:
            yield tree
            tree = []
        tree.append(run)
    if tree:
        yield tree


def _waves_of_tree(
    row: TreePlan, runs: Sequence[Run], wave_tokens: int, keep_history: bool, smallest_wave: int, whole: Ranges
) -> Iterator[Wave]:
    parts = _split_at_forks(runs)
    history, branches = parts[0], parts[1:]
    room = wave_tokens - (history[1] - history[0])
    longest = max((end - start for start, end in branches), default=0)
    if keep_history and branches and room >= max(longest, smallest_wave):
        yield _make_wave(row, *history, is_kept=True)
        parts, wave_tokens = branches, room
    for start, end in _pack(parts, wave_tokens, whole):
        yield _make_wave(row, start, end)


def _split_at_forks(runs: Sequence[Run]) -> list[tuple[int, int]]:
    """
    Split each run at its last fork: what follows the fork is a branch like the others.

    The runs of the example become `[0, 4)`, `[4, 7)`, `[7, 9)` and `[9, 11)`.
    """
    starts = [run.start for run in runs]
    last_fork: dict[int, int] = {}
    for run in runs:
        if run.prefix:
            fork = run.prefix[-1][1]
            parent = bisect_right(starts, fork - 1) - 1
            last_fork[parent] = max(fork, last_fork.get(parent, 0))
    parts: list[tuple[int, int]] = []
    for index, run in enumerate(runs):
        fork = last_fork.get(index, run.end)
        parts.append((run.start, fork))
        if fork < run.end:
            parts.append((fork, run.end))
    return parts


def _pack(parts: Sequence[tuple[int, int]], limit: int, whole: Ranges = ()) -> Iterator[tuple[int, int]]:
    """
    Yield ranges of at most `limit` tokens. A part that fits into one range is not split, and a range of `whole` never.

    With a limit of 4, the parts `[4, 7)`, `[7, 9)` and `[9, 11)` become `[4, 7)` and `[7, 11)`.
    """
    first = parts[0][0]
    for start, end in parts:
        if end - first > limit >= end - start and start > first:
            yield first, start
            first = start
        while end - first > limit:
            border = first + limit
            for begin, stop in whole:
                if begin < border < stop:
                    border = begin if begin > first else stop
            yield first, border
            first = border
    if first < parts[-1][1]:
        yield first, parts[-1][1]


def _without_single_tokens(row: TreePlan, groups: Sequence[tuple[Wave, ...]]) -> Iterator[tuple[Wave, ...]]:
    """Yield groups in which a wave of one token has joined the next one, or the last one before."""
    joined: list[list[Wave]] = []
    for group in groups:
        if joined and 1 in (sum(map(len, group)), sum(map(len, joined[-1]))):
            joined[-1].extend(group)
        else:
            joined.append(list(group))
    for waves in joined:
        merged: list[Wave] = []
        for wave in waves:
            before = merged[-1] if merged else None
            if before is None or (len(before) > 1 and (len(wave) > 1 or wave is not waves[-1])):
                merged.append(wave)
            else:
                is_kept = wave.is_kept or (before.is_kept and len(before) > 1)
                merged[-1] = _make_wave(row, before.start, wave.end, is_kept)
        yield tuple(merged)


def _make_wave(row: TreePlan, start: int, end: int, is_kept: bool = False) -> Wave:
    """Return a wave; the tokens that it hands on are the ancestors of the first token after it."""
    if end == row.length:
        return Wave(start, end, (), is_kept)
    run = row.runs[bisect_right(row.runs, end, key=lambda run: run.start) - 1]
    path = ((max(first, start), last) for first, last in (*run.prefix, (run.start, end)))
    return Wave(start, end, tuple((first, last) for first, last in path if first < last), is_kept)


# A wave as a row of its own ------------------------------------------------------------------------------------------


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
        """Yield where the range `[first, last)` of the row is, as half-open ranges of the other sequence."""
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
        begins_at = bisect_right(row.runs, first, key=lambda run: run.start) - 1
        for run in row.runs[begins_at : bisect_left(row.runs, last, key=lambda run: run.start)]:
            begin, end = max(run.start, first), min(run.end, last)
            assert not run.is_image or end - begin == run.end - run.start, "an image that sees itself is not cut"
            prefix = _join(locate((*run.prefix, (run.start, begin))))
            position, depth = start + begin - first, run.depth + begin - run.start
            _append(runs, Run(position, position + end - begin, depth, prefix, run.is_image))
    if length > num_running:
        runs.append(Run(num_running, length, 0, ()))
    images = (place for image in overlaps(row.images, running.ranges) for place in running.locate(*image))
    return TreePlan(length, tuple(runs), images=tuple(images))


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
