"""Rows: one or more trees in one token sequence, and the runs that kernels work on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .image_features import NO_FEATURE, FeatureNumbers, ImageReference, without_unused
from .prefix_tree import PrefixTree, Targets, roll_targets


Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of positions."""

ROW_COLUMNS = ("input_ids", "subtree_end", "token_parts", "token_weights", "multiplicity")
_INTEGERS = tuple(name for name in ROW_COLUMNS if name != "token_weights")
IMAGE_COLUMNS = ("image_features", "image_references")
"""Further columns of a dataset with images."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """
    One or more trees side by side in one token sequence.

    The arrays are those of [`PrefixTree`], with positions counted from the start of the row. Depths are not stored:
    they follow from `subtree_end` (see [`TreePlan`]). In a row with images, `images` are those that it shows, and
    `image_features` counts their features only; both are `None` and empty without images.
    """

    input_ids: NDArray[np.int64]
    subtree_end: NDArray[np.int64]
    token_parts: NDArray[np.int64]
    token_weights: NDArray[np.float64]
    multiplicity: NDArray[np.int64]
    image_features: NDArray[np.int64] | None = None
    images: tuple[ImageReference, ...] = ()

    @classmethod
    def from_tree(cls, tree: PrefixTree) -> Row:
        """Return the row that holds one tree."""
        row = cls(*(getattr(tree, name) for name in ROW_COLUMNS))
        if tree.image_features is None:
            return row
        features, images = without_unused(tree.image_features, tree.images)
        return replace(row, image_features=features, images=images)

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> Row:
        """Return the row that a dataset holds in `ROW_COLUMNS`, and in `IMAGE_COLUMNS` if it has images."""
        weights = np.asarray(columns["token_weights"], np.float64)
        arrays: dict[str, Any] = {name: np.asarray(columns[name], np.int64) for name in _INTEGERS}
        arrays["token_weights"] = weights if len(weights) else (arrays["token_parts"] > 0).astype(np.float64)
        row = cls(**arrays)
        row._check(columns.get("num_pairs"))
        if columns.get("image_features") is None:
            return row
        images = tuple(ImageReference(**image) for image in columns["image_references"])
        return replace(row, image_features=np.asarray(columns["image_features"], np.int64), images=images)

    def _check(self, num_pairs: int | None) -> None:
        """Refuse a row whose tree was changed, or does not fit its tokens: it would train as another text."""
        lengths = {name: len(getattr(self, name)) for name in ROW_COLUMNS}
        sizes = self.subtree_end - np.arange(lengths["subtree_end"])  # of subtrees
        fits = len(set(lengths.values())) == 1 and (sizes > 0).all() and (self.subtree_end <= len(self)).all()
        if not fits or num_pairs not in (None, sizes.sum()):
            raise ValueError(
                f"The tree of a prepared row (subtree_end) does not fit its tokens; lengths are {lengths}. Something "
                "changed the rows, such as a map over them. Change the messages, and prepare them again."
            )

    @classmethod
    def join(cls, rows: Sequence[Row]) -> Row:
        """Return one row that holds the trees of several rows side by side, with each distinct image once."""
        offsets = np.cumsum([0] + [len(row) for row in rows[:-1]])
        joined: dict[str, Any] = {name: np.concatenate([getattr(row, name) for row in rows]) for name in ROW_COLUMNS}
        joined["subtree_end"] = joined["subtree_end"] + np.repeat(offsets, [len(row) for row in rows])
        if all(row.image_features is None for row in rows):
            return cls(**joined)
        features, images = number_images_together(rows)
        return cls(**joined, image_features=np.concatenate(features), images=images)

    def split(self) -> list[Row]:
        """Return each tree of the row as a row of its own."""
        trees = []
        for start, end in pairwise([0, *tree_ends(self.subtree_end)]):
            arrays = {name: getattr(self, name)[start:end] for name in ROW_COLUMNS}
            tree = replace(self, **{**arrays, "subtree_end": arrays["subtree_end"] - start})
            if self.image_features is not None:
                features, images = without_unused(self.image_features[start:end], self.images)
                tree = replace(tree, image_features=features, images=images)
            trees.append(tree)
        return trees

    def apart(self, limit: int) -> Row:
        """
        Return the row in which no sample of up to `limit` tokens shares tokens with longer ones.

        A target that both have stays with the shorter ones, at whose end it is.
        """
        plan = TreePlan.from_subtree_end(self.subtree_end)
        ending, parts = count_ending(self.multiplicity, plan.runs), []
        is_short = plan.depths() < limit
        shorter, longer = (self._num_below(np.where(chosen, ending, 0)) for chosen in (is_short, ~is_short))
        for passing, is_target in ((shorter, shorter > 0), (longer, shorter == 0)):
            kept = passing > 0
            before = np.cumsum([0, *kept])
            arrays: dict[str, Any] = {
                name: np.where(is_target, getattr(self, name), 0) for name in ("token_parts", "token_weights")
            }
            arrays |= {"input_ids": self.input_ids, "multiplicity": passing, "subtree_end": before[self.subtree_end]}
            arrays = {name: values[kept] for name, values in arrays.items()}
            part = replace(self, **arrays)
            if self.image_features is not None:
                features, images = without_unused(self.image_features[kept], self.images)
                part = replace(part, image_features=features, images=images)
            parts.append(part)
        return Row.join([part for part in parts if len(part)])

    def _num_below(self, ending: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of samples that pass through each token, from the number that end there."""
        before = np.cumsum([0, *ending])
        passing: NDArray[np.int64] = before[self.subtree_end] - before[:-1]
        return passing

    def columns(self) -> dict[str, Any]:
        """Return the row as dataset columns. That of weights is empty where every trained token has weight 1."""
        columns = {name: getattr(self, name) for name in ROW_COLUMNS}
        if np.array_equal(self.token_weights, self.token_parts > 0):
            columns["token_weights"] = np.empty(0)
        if self.image_features is None:
            return columns
        return {
            **columns,
            "image_features": self.image_features,
            "image_references": [asdict(image) for image in self.images],
        }

    def targets(self, plan: TreePlan) -> Targets:
        """Return what each position of the row must predict, given the plan of the row."""
        forks = [(run.start, run.prefix[-1][1]) for run in plan.runs if run.prefix]
        return roll_targets(self.input_ids, self.token_parts, self.token_weights, forks)

    def all_image_features(self) -> NDArray[np.int64]:
        """Return the feature that each token shows; -1 for all tokens of a row without images."""
        return np.full(len(self), NO_FEATURE) if self.image_features is None else self.image_features

    def __len__(self) -> int:
        return len(self.input_ids)


def count_ending(multiplicity: NDArray[np.integer], runs: Sequence[Run]) -> NDArray[np.int64]:
    """Return how many samples end at each token: as many as come in and do not go on, `(num_tokens,)`."""
    ending = multiplicity.astype(np.int64)
    for run in runs:
        ending[run.start : run.end - 1] -= multiplicity[run.start + 1 : run.end]
        if run.prefix:
            ending[run.prefix[-1][1] - 1] -= multiplicity[run.start]
    return ending.clip(min=0)


def overlaps(ranges: Ranges, others: Ranges) -> Ranges:
    """Return the parts of some ranges that lie in others, both in ascending order."""
    both = ((max(first, start), min(last, end)) for start, end in others for first, last in ranges)
    return tuple((first, last) for first, last in both if first < last)


def tree_ends(subtree_end: Sequence[int] | NDArray[np.integer]) -> list[int]:
    """Return the position just past each tree of a row: `[3, 2, 3, 5, 5]` holds trees that end at 3 and 5."""
    ends: list[int] = []
    while (root := ends[-1] if ends else 0) < len(subtree_end):
        ends.append(int(subtree_end[root]))
    return ends


def number_images_together(rows: Sequence[Row]) -> tuple[list[NDArray[np.int64]], tuple[ImageReference, ...]]:
    """Return the features that the tokens of each row show, in one numbering, and all distinct images of the rows."""
    numbers = FeatureNumbers()
    numbers.add(sorted((image for row in rows for image in row.images), key=lambda image: image.in_company))
    features = [numbers.renumber(row.all_image_features(), row.images) for row in rows]
    return features, numbers.images


@dataclass(frozen=True, slots=True)
class Run:
    """Longest range of a row in which every token's parent is the token before it."""

    start: int  # position of the first token
    end: int  # position just past the last token
    depth: int  # of the first token: the number of tokens in `prefix`
    prefix: Ranges  # ranges that hold the ancestors of the first token, in the order of their depth
    is_image: bool = False  # an image whose tokens see each other in both directions ([`TreePlan.with_image_runs`])

    @property
    def path(self) -> Ranges:
        """The ranges that hold the path from the root to the last token, in the order of their depth."""
        return (*self.prefix, (self.start, self.end))

    @property
    def path_positions(self) -> NDArray[np.int64]:
        """The positions of the tokens of `path`, shape `(path_length,)`."""
        return np.concatenate([np.arange(*part) for part in self.path])


@dataclass(frozen=True, slots=True)
class TreePlan:
    """
    Structure of a row in plain integers: what a kernel needs to run tree attention without a device synchronisation.
    """

    length: int  # tokens in the row
    runs: tuple[Run, ...]  # in the order of their positions; together they cover the row
    # position just past the last token of each row of the dataset that stands in it
    example_ends: tuple[int, ...] = ()
    num_sample_tokens: int = 0  # tokens in all its samples: what N-pass computes
    images: Ranges = ()  # longest ranges of tokens that show images, each inside one run
    image_sizes: tuple[int, ...] = ()  # number of features of each distinct image

    @classmethod
    def from_rows(cls, rows: Sequence[Row], joined: Row | None = None) -> TreePlan:
        """Return the plan of several rows of a dataset side by side in one row, which is `joined` if it is there."""
        row = Row.join(rows) if joined is None else joined
        plan = cls.from_subtree_end(row.subtree_end)
        return replace(
            plan if row.image_features is None else plan.with_images(row.image_features >= 0),
            example_ends=tuple(np.cumsum([len(row) for row in rows]).tolist()),
            num_sample_tokens=sum(int(row.multiplicity.sum()) for row in rows),
            image_sizes=tuple(image.num_features for image in row.images),
        )

    @classmethod
    def from_subtree_end(cls, subtree_end: NDArray[np.int64]) -> TreePlan:
        """
        Return the plan of a row with `subtree_end` of shape `(num_tokens,)`, int64.

        A run ends where a token has no descendants. For `subtree_end = [6, 4, 4, 4, 6, 6]`, that is after positions 3
        and 5: the runs are `[0, 4)`, with no ancestors, and `[4, 6)` at depth 1, whose ancestors are `[0, 1)`.
        """
        length = len(subtree_end)
        if not length:
            return cls(0, ())
        before, position = subtree_end[:-1], np.arange(1, length)
        begins_run = before <= position
        borders = np.flatnonzero(begins_run | (before != subtree_end[1:]))
        starts = [0, *position[borders].tolist()]
        found: list[tuple[int, int, Ranges]] = []  # start, depth and prefix of each run
        path: list[tuple[int, int]] = []  # ranges that hold the path to the token before
        stack: list[tuple[int, int]] = []  # of the parts of that path with one `subtree_end`: start and that end
        depth = 0
        for start, end, of_run, last_descendant in zip(
            starts,
            [*starts[1:], length],
            [True, *begins_run[borders].tolist()],
            subtree_end[starts].tolist(),
            strict=True,
        ):
            while stack and stack[-1][1] <= start:  # no ancestors of this run
                (first, last), (cut, _) = path.pop(), stack.pop()
                depth -= last - cut
                path += [(first, cut)] if first < cut else []
            if of_run:
                found.append((start, depth, tuple(path)))
                path.append((start, end))
            else:
                path[-1] = path[-1][0], end
            stack.append((start, last_descendant))
            depth += end - start
        ends = [*(start for start, _, _ in found[1:]), length]
        runs = (Run(start, end, depth, path) for (start, depth, path), end in zip(found, ends, strict=True))
        return cls(length, tuple(runs))

    def with_images(self, shows_image: NDArray[np.bool_]) -> TreePlan:
        """Return the plan of a row with images; `shows_image`, `(num_tokens,)`, marks the tokens that show one."""
        # A range that goes on in the next run of the row is cut there: the next run is another branch.
        starts = np.array([run.start for run in self.runs], np.int64)
        before = np.concatenate([[False], shows_image[:-1]])
        before[starts] = False
        after = np.concatenate([shows_image[1:], [False]])
        after[starts[1:] - 1] = False
        first, last = np.flatnonzero(shows_image & ~before), np.flatnonzero(shows_image & ~after)
        return replace(self, images=tuple(zip(first.tolist(), (last + 1).tolist(), strict=True)))

    def with_image_runs(self) -> TreePlan:
        """
        Return the plan in which each range of image tokens is a run of its own.

        A run `[0, 9)` with the image `[2, 6)` becomes `[0, 2)`, `[2, 6)` after the ancestors `[0, 2)`, and `[6, 9)`
        after `[0, 6)`.

        Raises `ValueError` if a branch leaves an image before its end, or goes on with another image right after it:
        tokens of the shared image would see different tokens in different samples.
        """
        ends = {end for _, end in self.images}
        inside = np.zeros(self.length, np.bool_)
        for start, end in self.images:
            inside[start:end] = True
        starts_of_images = {start for start, _ in self.images}
        runs: list[Run] = []
        for run in self.runs:
            fork = run.prefix[-1][1] if run.prefix else 0
            if fork and inside[fork - 1] and (fork not in ends or run.start in starts_of_images):
                raise ValueError(
                    "Two turns share an image and differ inside it or right behind it, where one of them goes on with "
                    "another image. This model lets the tokens of adjacent images see each other, so the shared image "
                    "is not the same in both. Put text between images, or train with TRL's SFTTrainer."
                )
            borders = [place for image in self.images for place in image if run.start < place < run.end]
            borders = sorted({run.start, *borders, run.end})
            for start, end in pairwise(borders):
                earlier = ((run.start, start),) if start > run.start else ()
                depth = run.depth + start - run.start
                runs.append(Run(start, end, depth, (*run.prefix, *earlier), is_image=bool(inside[start])))
        return replace(self, runs=tuple(runs))

    def depths(self) -> NDArray[np.int64]:
        """Return the depth of each token: the `position_ids` of the row."""
        if not self.runs:
            return np.empty(0, np.int64)
        return np.concatenate([np.arange(run.depth, run.depth + run.end - run.start) for run in self.runs])
