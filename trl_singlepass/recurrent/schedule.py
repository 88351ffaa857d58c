"""In which pieces a recurrent layer runs over a row of trees: plain integers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..trees.rows import TreePlan


Ranges = tuple[tuple[int, int], ...]

# Pieces that run together are filled up to the longest; one that is shorter than this share of it starts a new batch.
SHORTEST_IN_BATCH = 0.7


@dataclass(frozen=True, slots=True)
class Piece:
    """
    Tokens that a layer runs over in one call, all on one path.

    Args:
        ranges (`Ranges`):
            Half-open ranges of row positions, in the order of their depth.
        num_warmup (`int`):
            Number of leading tokens that are run again only to bring the layer into the right state.
        source (`int`, *optional*, defaults to -1):
            Index of the piece whose final state this one starts from, -1 for the start of a sample.
        is_source (`bool`, *optional*, defaults to `False`):
            Whether another piece starts from the final state of this one, or one of a later row does.
        recalled (`int`, *optional*, defaults to -1):
            Position of the token outside the row after which this piece starts, -1 for none. Positions from the length
            of the row on lie outside of it.
    """

    ranges: Ranges
    num_warmup: int
    source: int = -1
    is_source: bool = False
    recalled: int = -1

    @property
    def starts_from_state(self) -> bool:
        """Whether the layer finds a state when it runs over this piece."""
        return self.source >= 0 or self.recalled >= 0

    @property
    def length(self) -> int:
        """Number of tokens that the layer runs over."""
        return sum(end - start for start, end in self.ranges)


@dataclass(frozen=True, slots=True)
class Schedule:
    """
    Pieces that together cover a row, and the order in which they run.

    Args:
        pieces (`tuple[Piece, ...]`):
            Pieces.
        batches (`tuple[tuple[int, ...], ...]`):
            Indices of the pieces that run together, longest first; a piece's source comes in an earlier batch.
    """

    pieces: tuple[Piece, ...]
    batches: tuple[tuple[int, ...], ...]


def path_schedule(plan: TreePlan, reach: int | None = None, shortest_in_batch: float = SHORTEST_IN_BATCH) -> Schedule:
    """
    Run every branch together with its history.

    Args:
        plan (`TreePlan`):
            Structure of the row.
        reach (`int`, *optional*):
            How many tokens back an output of the layer depends on. Only so much history is run again; all of it if
            not given.
        shortest_in_batch (`float`, *optional*, defaults to 0.7):
            Share of a batch's longest piece that its shortest has at least.

    Returns:
        `Schedule`: One piece per run of the plan.
    """
    pieces = []
    for run in plan.runs:
        history = run.prefix if reach is None else _last_tokens(run.prefix, reach)
        num_warmup = sum(end - start for start, end in history)
        pieces.append(Piece((*history, (run.start, run.end)), num_warmup))
    return Schedule(tuple(pieces), tuple(_batches(pieces, range(len(pieces)), shortest_in_batch)))


def fork_schedule(plan: TreePlan, handed_on: Collection[int] = ()) -> Schedule:
    """
    Run the history once, cut where branches leave it, and start every branch from the state at its fork.

    Pieces that others start from run one by one, because the state after padding is not the state at the fork. What
    continues tokens outside the row runs the last of them again: no such piece is a single token.

    Args:
        plan (`TreePlan`):
            Structure of the row.
        handed_on (`Collection[int]`, *optional*):
            Positions just past the tokens whose states later rows start from.

    Returns:
        `Schedule`: Pieces that begin and end at forks.
    """
    pieces = _fork_pieces(plan, handed_on)
    sources = [(index,) for index, piece in enumerate(pieces) if piece.is_source]
    ends = [index for index, piece in enumerate(pieces) if not piece.is_source]
    starts = [index for index in ends if not pieces[index].starts_from_state]
    leaves = [index for index in ends if pieces[index].starts_from_state]
    return Schedule(tuple(pieces), (*sources, *_batches(pieces, starts), *_batches(pieces, leaves)))


def _fork_pieces(plan: TreePlan, handed_on: Collection[int]) -> list[Piece]:
    forks = {run.prefix[-1][1] for run in plan.runs if run.prefix and run.prefix[-1][0] < plan.length}
    cuts = sorted(forks | set(handed_on))
    pieces: list[Piece] = []
    piece_ending_at: dict[int, int] = {}
    for run in plan.runs:
        borders = [run.start, *(cut for cut in cuts if run.start < cut < run.end), run.end]
        for start, end in pairwise(borders):
            piece = Piece(((start, end),), 0, is_source=end < run.end or end in handed_on)
            if start > run.start:
                piece = replace(piece, source=piece_ending_at[start])
            elif run.prefix and run.prefix[-1][0] >= plan.length:
                piece = _after_tokens_outside(piece, run.prefix)
            elif run.prefix:
                piece = replace(piece, source=piece_ending_at[run.prefix[-1][1]])
            if piece.is_source and piece.length == 1 and piece.source >= 0:
                piece = _with_source_run_again(piece, pieces[piece.source])
            piece_ending_at[end] = len(pieces)
            pieces.append(piece)
    return pieces


def _after_tokens_outside(piece: Piece, prefix: Ranges) -> Piece:
    """Let a piece run the last token of its history again, from the state before that token."""
    last = prefix[-1][1] - 1
    before = [end - 1 for start, end in (*prefix[:-1], (prefix[-1][0], last)) if start < end]
    recalled = before[-1] if before else -1
    return replace(piece, ranges=((last, last + 1), *piece.ranges), num_warmup=1, recalled=recalled)


def _with_source_run_again(piece: Piece, source: Piece) -> Piece:
    """
    Give a single token the tokens of its source to run along.

    Layers take a single token on top of a state for a step of generation, whose kernels have no gradients; and a token
    of padding would change the state that other pieces start from.
    """
    return replace(source, ranges=source.ranges + piece.ranges, num_warmup=source.length)


def _last_tokens(path: Ranges, count: int) -> Ranges:
    kept: list[tuple[int, int]] = []
    for start, end in reversed(path):
        if count <= 0:
            break
        kept.append((max(start, end - count), end))
        count -= end - start
    return tuple(reversed(kept))


def _batches(
    pieces: Sequence[Piece], indices: Sequence[int], shortest: float = SHORTEST_IN_BATCH
) -> Iterator[tuple[int, ...]]:
    """Group pieces of similar length, longest first."""
    batch: list[int] = []
    for index in sorted(indices, key=lambda index: -pieces[index].length):
        if batch and pieces[index].length < shortest * pieces[batch[0]].length:
            yield tuple(batch)
            batch = []
        batch.append(index)
    if batch:
        yield tuple(batch)
