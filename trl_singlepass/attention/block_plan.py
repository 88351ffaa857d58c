"""Blocks of a row: which queries meet which ranges of keys, so that every visible pair is in exactly one block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from ..trees.rows import Ranges, Run
from .tree_mask import TreeMask


class BlockKind(StrEnum):
    """Which pairs of a block are visible."""

    FULL = "full"
    """All: the keys are ancestors of every query."""
    CAUSAL = "causal"
    """Keys up to the query: keys and queries are the same tokens of a run."""
    MASKED = "masked"
    """Those that the model's rule allows."""


@dataclass(frozen=True, slots=True)
class Block:
    """Queries `[start, end)` of a row against the keys in some ranges."""

    start: int
    end: int  # just past the last query
    keys: Ranges  # positions, in the order of their depth
    key_depth: int  # depth of the first key
    kind: BlockKind
    # If the queries belong to an image whose tokens see each other and the block is masked: the depth of its first
    # token, and the depth just past its last one.
    image: tuple[int, int] | None = None

    @property
    def num_keys(self) -> int:
        """Number of keys."""
        return sum(last - first for first, last in self.keys)


def tree_blocks(mask: TreeMask, query_block: int | None) -> list[Block]:
    """
    Return all blocks of a row; the blocks of one range of queries are neighbours.

    Where every ancestor is visible, a block has at most `query_block` queries.
    """
    if mask.is_causal:
        return [block for run in mask.plan.runs for block in causal_blocks(run, query_block)]
    return [block for run in mask.plan.runs for block in masked_blocks(run, mask.local_size)]


def causal_blocks(run: Run, query_block: int | None) -> Iterator[Block]:
    """
    Yield the blocks of a run whose tokens see all their ancestors.

    A run at positions 7 to 9 that forks off after position 2, `Run(7, 10, depth=3, prefix=((0, 3),))`, has two blocks:
    queries 7 to 9 against keys 0 to 2 (full), and against one another (causal). With at most 2 queries per block:

        queries 7, 8   keys 0-2 full   keys 7, 8 causal
        query 9        keys 0-2 full   keys 7, 8 full      key 9 causal

    If the run is an image, its own block is full as well: queries 7 to 9 see keys 7 to 9.
    """
    for start, end in _split(run.start, run.end, query_block):
        depth = 0
        for first, last in run.prefix:
            yield Block(start, end, ((first, last),), depth, BlockKind.FULL)
            depth += last - first
        if run.is_image:
            yield Block(start, end, ((run.start, run.end),), run.depth, BlockKind.FULL)
            continue
        if start > run.start:
            yield Block(start, end, ((run.start, start),), run.depth, BlockKind.FULL)
        yield Block(start, end, ((start, end),), run.depth + start - run.start, BlockKind.CAUSAL)


def masked_blocks(run: Run, local_size: int | None) -> Iterator[Block]:
    """
    Yield the blocks of a run under a rule that looks at most `local_size` tokens back.

    The run of the example above under a window of 2: its first query, at depth 3, looks back to depth 2. So there is
    one block, queries 7 to 9 against the keys 2 and 7 to 9, whose first key has depth 2. An image is seen up to its
    end by each of its queries, and some models let them look back to its start, however far.
    """
    query_block = 256 if local_size is None else min(max(64, local_size // 4), 512)
    image = (run.depth, run.depth + run.end - run.start) if run.is_image else None
    for start, end in _split(run.start, run.end, query_block):
        depth = run.depth + start - run.start
        key_depth = 0 if local_size is None else max(0, depth - local_size + 1)
        key_depth = key_depth if image is None else min(key_depth, run.depth)
        keys = _from_depth((*run.prefix, (run.start, end if image is None else run.end)), key_depth)
        yield Block(start, end, keys, key_depth, BlockKind.MASKED, image)


def _split(start: int, end: int, size: int | None) -> Iterator[tuple[int, int]]:
    size = size or end - start
    for first in range(start, end, size):
        yield first, min(first + size, end)


def _from_depth(path: Ranges, depth: int) -> Ranges:
    """A path without its first `depth` tokens: `((0, 3), (7, 10))` from depth 2 on is `((2, 3), (7, 10))`."""
    kept = []
    for first, last in path:
        skipped = min(depth, last - first)
        depth -= skipped
        if first + skipped < last:
            kept.append((first + skipped, last))
    return tuple(kept)
