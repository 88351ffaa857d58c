"""
The pieces in which a recurrent layer runs over a row of trees, in plain integers.

A layer that follows one path at a time cannot run over a whole row. It either replays the history before each branch
([`path_schedule`]) or starts each branch from the state at its fork ([`fork_schedule`]). For a row of 11 tokens, whose
trunk is `[0, 7)`, with branches `[7, 9)` after token 3 and `[9, 11)` after token 1:

    path_schedule    pieces   0: [0, 7)   1: [0, 4) [7, 9)   2: [0, 2) [9, 11)
                     batches  (0, 1)  (2,)
    with reach 2     pieces   0: [0, 7)   1: [2, 4) [7, 9)   2: [0, 2) [9, 11)
                     batches  (0,)  (1, 2)
    fork_schedule    pieces   0: [0, 2)   1: [2, 4) from 0   2: [4, 7) from 1   3: [7, 9) from 1   4: [9, 11) from 0
                     batches  (0,)  (1,)  (2,)  (3, 4)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..trees.rows import Ranges, TreePlan


# Batches are padded to their longest piece. A piece shorter than this share of it starts a new batch.
MIN_LENGTH_RATIO = 0.7


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that a layer runs over in one call, all on one path."""

    # Half-open ranges of row positions, in the order of their depth. The last one is the piece's own; those before it
    # belong to other pieces and are replayed.
    ranges: Ranges
    num_replayed: int  # number of tokens in the replayed ranges
    source: int = -1  # index of the piece whose final state this one starts from, -1 for none
    is_source: bool = False  # whether another piece, or one of a later row, starts from this one's final state
    # Position of the token outside the row whose state this piece starts from, -1 for none. Positions from the row's
    # length on lie outside it.
    source_token: int = -1

    @property
    def starts_from_state(self) -> bool:
        """Whether the layer starts from a state when it runs over this piece."""
        return self.source >= 0 or self.source_token >= 0

    @property
    def length(self) -> int:
        """Number of tokens that the layer runs over."""
        return sum(end - start for start, end in self.ranges)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Pieces that together cover a row, and the order in which they run."""

    pieces: tuple[Piece, ...]
    # Indices of the pieces that run together, longest first. A piece's source is in an earlier batch.
    batches: tuple[tuple[int, ...], ...]


def path_schedule(plan: TreePlan, reach: int | None = None, min_length_ratio: float = MIN_LENGTH_RATIO) -> Schedule:
    """Run every branch together with its history, `reach` tokens of it or all, in batches of similar length."""
    pieces = []
    for run in plan.runs:
        history = run.prefix if reach is None else last_tokens(run.prefix, reach)
        num_replayed = sum(end - start for start, end in history)
        pieces.append(Piece((*history, (run.start, run.end)), num_replayed))
    return Schedule(tuple(pieces), tuple(_batches(pieces, range(len(pieces)), min_length_ratio)))


def fork_schedule(plan: TreePlan, state_ends: Collection[int] = (), *, of_kernel: bool = False) -> Schedule:
    """
    Run the history once, cut where branches leave it and at `state_ends`, and start every branch from a state.

    Pieces that others start from run one at a time, because the state after padding is not the state at the fork.
    Unless they are those of a kernel, pieces that start from a state are at least two tokens long, since a layer takes
    a single one for a step of generation: they replay the last token before the row, or the piece before them.
    """
    pieces = _fork_pieces(plan, state_ends, of_kernel)
    sources = [(index,) for index, piece in enumerate(pieces) if piece.is_source]
    ends = [index for index, piece in enumerate(pieces) if not piece.is_source]
    starts = [index for index in ends if not pieces[index].starts_from_state]
    continued = [index for index in ends if pieces[index].starts_from_state]
    return Schedule(tuple(pieces), (*sources, *_batches(pieces, starts), *_batches(pieces, continued)))


def _fork_pieces(plan: TreePlan, state_ends: Collection[int], of_kernel: bool) -> list[Piece]:
    forks = {run.prefix[-1][1] for run in plan.runs if run.prefix and run.prefix[-1][0] < plan.length}
    cuts = sorted(forks | set(state_ends))
    pieces: list[Piece] = []
    piece_ending_at: dict[int, int] = {}
    for run in plan.runs:
        borders = [run.start, *(cut for cut in cuts if run.start < cut < run.end), run.end]
        for start, end in pairwise(borders):
            piece = Piece(((start, end),), 0, is_source=end < run.end or end in state_ends)
            if start > run.start:
                piece = replace(piece, source=piece_ending_at[start])
            elif run.prefix and run.prefix[-1][0] >= plan.length and of_kernel:
                piece = replace(piece, source_token=run.prefix[-1][1] - 1)
            elif run.prefix and run.prefix[-1][0] >= plan.length:
                # It replays the last token of its history, from the state before that token.
                last = run.prefix[-1][1] - 1
                before = [stop - 1 for begin, stop in (*run.prefix[:-1], (run.prefix[-1][0], last)) if begin < stop]
                ranges, source_token = ((last, last + 1), *piece.ranges), before[-1] if before else -1
                piece = replace(piece, ranges=ranges, num_replayed=1, source_token=source_token)
            elif run.prefix:
                piece = replace(piece, source=piece_ending_at[run.prefix[-1][1]])
            if piece.is_source and piece.length == 1 and piece.source >= 0 and not of_kernel:
                # The kernels of a generation step have no gradients, and padding would change the state that others
                # start from.
                source = pieces[piece.source]
                piece = replace(source, ranges=source.ranges + piece.ranges, num_replayed=source.length)
            piece_ending_at[end] = len(pieces)
            pieces.append(piece)
    return pieces


def last_tokens(path: Ranges, count: int) -> Ranges:
    """Return the last `count` tokens of a path, in the order of their depth; all of a shorter path."""
    kept: list[tuple[int, int]] = []
    for start, end in reversed(path):
        if count <= 0:
            break
        kept.append((max(start, end - count), end))
        count -= end - start
    return tuple(reversed(kept))


def _batches(
    pieces: Sequence[Piece], indices: Sequence[int], min_length_ratio: float = MIN_LENGTH_RATIO
) -> Iterator[tuple[int, ...]]:
    """Group pieces of similar length, longest first."""
    batch: list[int] = []
    for index in sorted(indices, key=lambda index: -pieces[index].length):
        if batch and pieces[index].length < min_length_ratio * pieces[batch[0]].length:
            yield tuple(batch)
            batch = []
        batch.append(index)
    if batch:
        yield tuple(batch)


@dataclass(frozen=True, slots=True)
class ReplayMode:
    """How a layer runs on a tree."""

    # Whether branches start from the state at their fork. If not, their history is replayed before them.
    starts_from_state: bool
    reach: int | None = None  # how many tokens back an output depends on; `None` for all of them
    attends: bool = False  # whether the layer is attention, which needs its own causal mask over a path
    by_kernels: bool = False  # whether only its convolution, which has this reach, and its scan see the tree

    def schedule(self, plan: TreePlan, state_ends: Collection[int] = ()) -> Schedule:
        """Return the pieces in which the layer runs over a row; for `state_ends`, see [`fork_schedule`]."""
        if self.starts_from_state:
            return fork_schedule(plan, state_ends, of_kernel=self.by_kernels)
        # How many tokens attention selects depends on the length of the batch, so all paths run in one batch.
        return path_schedule(plan, self.reach, min_length_ratio=0.0 if self.attends else MIN_LENGTH_RATIO)
