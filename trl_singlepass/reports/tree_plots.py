"""Plots of a prefix tree and of its attention mask. They need matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..data.bad_rows import count_of
from ..trees.prefix_tree import PrefixTree
from ..trees.rows import Run, TreePlan


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

CONTEXT, TRAINED, INK = "#c9d3df", "#f2a65a", "#26323f"
WIDTH, LANE_HEIGHT = 13.0, 0.42  # inches
INCHES_PER_CHARACTER = 0.068  # at 7.5 points, monospaced


@dataclass(frozen=True, slots=True)
class _SampleEnd:
    """Where a sample ends: its lane (index of a run), and the depth just after its last token."""

    lane: int
    depth: int
    turn: int


@dataclass(frozen=True, slots=True, eq=False)
class _Lanes:
    """A tree as lanes, one for each of its runs."""

    tree: PrefixTree
    runs: Sequence[Run]
    trained: NDArray[np.bool_]  # for each token, whether it is predicted from the one before it on its path
    ends: list[_SampleEnd]  # of all samples, numbered by turn

    @classmethod
    def from_tree(cls, tree: PrefixTree) -> _Lanes:
        plan = TreePlan.from_subtree_end(tree.subtree_end)
        trained = tree.token_weights > 0
        return cls(tree, plan.runs, trained, _sample_ends(tree, plan.runs, trained))

    @property
    def places(self) -> list[int]:
        """The place of each lane: the trunk on top, below it the branches in the order of their turns."""
        first_turn = [min(end.turn for end in self.ends if end.lane == lane) for lane in range(len(self.runs))]
        order = sorted(range(len(self.runs)), key=lambda lane: (lane > 0, first_turn[lane]))
        return [order.index(lane) for lane in range(len(self.runs))]

    def ends_inside(self, lane: int) -> list[int]:
        """Depths of the turns that are labelled inside a lane: those that it continues, and all of several."""
        depths = [end.depth for end in self.ends if end.lane == lane]
        run = self.runs[lane]
        is_whole = len(depths) == 1 or lane == 0
        return [depth for depth in depths if not is_whole or depth < run.depth + run.end - run.start]


def _sample_ends(tree: PrefixTree, runs: Sequence[Run], trained: NDArray[np.bool_]) -> list[_SampleEnd]:
    continued = np.zeros(len(tree.segments), np.int64)
    for segment in tree.segments:
        if segment.parent >= 0:
            continued[segment.parent] += segment.num_samples
    found = []
    for segment, num_continued in zip(tree.segments, continued, strict=True):
        lane = _lane_of(runs, segment.start)
        starts = _trained_starts(trained, runs[lane], segment.end)
        end = (starts, lane, segment.depth + segment.end - segment.start)
        found += [end] * int(segment.num_samples - num_continued)
    return [_SampleEnd(lane, depth, turn) for turn, (_, lane, depth) in enumerate(sorted(found), start=1)]


def _trained_starts(trained: NDArray[np.bool_], run: Run, end: int) -> list[int]:
    """Depths at which a path's trained ranges begin, which put turns in order: later ones have more history."""
    on_path = np.concatenate([trained[first:last] for first, last in (*run.prefix, (run.start, end))])
    starts: list[int] = np.flatnonzero(on_path & ~np.append(False, on_path[:-1])).tolist()
    return starts


def _lane_of(runs: Sequence[Run], position: int) -> int:
    return next(lane for lane, run in enumerate(runs) if run.start <= position < run.end)


def plot_tree(
    tree: PrefixTree, tokenizer: PreTrainedTokenizerBase, thumbnails: Sequence[Image] | None = None
) -> Figure:
    """
    Plot the tree of one conversation: depth from left to right, the trunk on top, each branch in a lane of its own.

    The tokenizer decodes the text in the bars. `thumbnails` are the images of `tree.images`, to draw where the tree
    shows them.
    """
    from matplotlib.figure import Figure

    lanes = _Lanes.from_tree(tree)
    places = lanes.places
    figure = Figure(figsize=(WIDTH, 1.1 + LANE_HEIGHT * len(lanes.runs)), layout="constrained")
    axes = figure.add_subplot()
    for lane, place in enumerate(places):
        _draw_lane(axes, lanes, tokenizer, lane, place)
    for run, place in zip(lanes.runs[1:], places[1:], strict=True):
        if run.prefix:  # a line from the lane that it leaves
            parent = places[_lane_of(lanes.runs, run.prefix[-1][0])]
            axes.plot([run.depth, run.depth], [parent, place], color=INK, linewidth=0.7, zorder=0.5)
    for end in lanes.ends:
        _label_sample(axes, lanes, end, places[end.lane])
    if thumbnails is not None:
        _draw_thumbnails(axes, lanes, thumbnails)
    _finish_tree(axes, lanes)
    return figure


def plot_mask(tree: PrefixTree, tokenizer: PreTrainedTokenizerBase) -> Figure:
    """
    Plot which tokens each token of a tree attends to, for up to a few thousand tokens.

    The tokenizer decodes the first words of each run, which label it.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    lanes = _Lanes.from_tree(tree)
    position = np.arange(len(tree))
    attends = (position[None, :] <= position[:, None]) & (position[:, None] < tree.subtree_end[None, :])
    shade = attends.astype(np.int8) + (attends & lanes.trained[:, None])
    figure = Figure(figsize=(9.6, 8.0))
    axes = figure.add_axes((0.22, 0.07, 0.75, 0.88))
    axes.imshow(shade, cmap=ListedColormap(["#ffffff", CONTEXT, TRAINED]), vmin=0, vmax=2, interpolation="nearest")
    for run in lanes.runs[1:]:
        axes.axhline(run.start - 0.5, color=INK, linewidth=0.4)
        axes.axvline(run.start - 0.5, color=INK, linewidth=0.4)
    _label_runs(axes, lanes, tokenizer)
    share = attends.sum() / (len(tree) * (len(tree) + 1) / 2)
    axes.set_xlabel("attended token (position in the row)")
    axes.set_title(f"{count_of(len(tree), 'token')}; {share:.0%} of the causal triangle is used", fontsize=10)
    _legend(axes, "upper right", "attention of a context token", "attention of a trained token")
    return figure


def _draw_lane(axes: Axes, lanes: _Lanes, tokenizer: PreTrainedTokenizerBase, lane: int, place: int) -> None:
    """One bar per range of trained or context tokens, with as much of its text as fits."""
    tree, run = lanes.tree, lanes.runs[lane]
    trained, labelled = lanes.trained[run.start : run.end], lanes.ends_inside(lane)
    characters_per_token = (WIDTH - 1.2) / INCHES_PER_CHARACTER / (tree.position_ids.max() + 1)
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(trained)]
    for start, end in pairwise(borders):
        colour, left = TRAINED if trained[start] else CONTEXT, run.depth + start
        axes.barh(place, end - start, left=left, height=0.72, color=colour, edgecolor="white", linewidth=0.8)
        room = int((end - start) * characters_per_token) - (9 if run.depth + end in labelled else 1)
        text = _clip(tokenizer.decode(tree.input_ids[run.start + start : run.start + end].tolist()), room)
        axes.annotate(
            text, (left, place), xytext=(2, 0), textcoords="offset points",
            va="center", fontsize=7.5, family="monospace", color=INK, parse_math=False,
        )  # fmt: skip


def _label_sample(axes: Axes, lanes: _Lanes, end: _SampleEnd, place: int) -> None:
    """Inside a lane with several turns; right of the trunk; left of a branch, where no line to a later one passes."""
    axes.plot([end.depth, end.depth], [place - 0.42, place + 0.42], color=INK, linewidth=1.4)
    is_inside = end.depth in lanes.ends_inside(end.lane)
    is_left = end.lane > 0 and not is_inside
    axes.annotate(
        f"turn {end.turn}", (lanes.runs[end.lane].depth if is_left else end.depth, place),
        xytext=(-3 if is_left or is_inside else 3, 0), textcoords="offset points",
        ha="right" if is_left or is_inside else "left", va="center", fontsize=8, weight="bold", color=INK,
        bbox=None if is_inside else {"facecolor": "white", "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def _draw_thumbnails(axes: Axes, lanes: _Lanes, thumbnails: Sequence[Image]) -> None:
    """Each image over the tokens that show it, in every place."""
    first, places = 0, lanes.places
    for image, thumbnail in zip(lanes.tree.images, thumbnails, strict=True):
        for start in np.flatnonzero(lanes.tree.image_features == first).tolist():
            lane = _lane_of(lanes.runs, start)
            left, place = lanes.runs[lane].depth + start - lanes.runs[lane].start, places[lane]
            extent = (left, left + image.num_features, place + 0.36, place - 0.36)
            axes.imshow(np.asarray(thumbnail), extent=extent, aspect="auto", zorder=4)  # over the text
        first += image.num_features


def _finish_tree(axes: Axes, lanes: _Lanes) -> None:
    tree = lanes.tree
    axes.set_xlim(0, (int(tree.position_ids.max()) + 1) * 1.07)
    axes.set_ylim(len(lanes.runs) - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_xlabel("depth (tokens from the start of the conversation)")
    axes.set_title(
        f"{count_of(len(lanes.ends), 'turn')}, {count_of(tree.num_sample_tokens, 'token')} as separate samples, "
        f"{len(tree):,} as a tree: sharing factor {tree.sharing_factor:.2f}",
        fontsize=10,
    )
    axes.spines[["left", "right", "top"]].set_visible(False)
    _legend(axes, "lower left", "context", "trained")


def _label_runs(axes: Axes, lanes: _Lanes, tokenizer: PreTrainedTokenizerBase) -> None:
    """Label each run with its turns and first words; runs that are too low for two lines are skipped."""
    ticks, labels, free_from = [], [], -np.inf
    for lane, run in enumerate(lanes.runs):
        middle = (run.start + run.end) / 2
        if middle >= free_from:
            turns = [str(end.turn) for end in lanes.ends if end.lane == lane]
            words = tokenizer.decode(lanes.tree.input_ids[run.start : min(run.end, run.start + 12)].tolist())
            ticks.append(middle)
            title = f"turn{'s' * (len(turns) > 1)} {', '.join(turns)}"
            labels.append(f"{_clip(title, 24)}\n{_clip(words, 24)}")
            free_from = middle + len(lanes.tree) / 27
    axes.set_yticks(ticks, labels, fontsize=7.5, family="monospace", parse_math=False)


def _legend(axes: Axes, location: str, context: str, trained: str) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=CONTEXT, label=context), Patch(color=TRAINED, label=trained)]
    axes.legend(handles=handles, loc=location, fontsize=8, framealpha=0.9)


def _clip(text: str, room: int) -> str:
    text = " ".join(text.split())
    if len(text) <= room:
        return text
    return text[: room - 1] + "…" if room >= 4 else ""
