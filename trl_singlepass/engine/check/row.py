"""The small row that the measured check runs as a tree and as separate samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...trees.image_features import NO_FEATURE, ImageReference
from ...trees.rows import Row
from ...trees.sample import Sample


# Parts of the row in the order in which they stand in it, with the part that each continues and its number of tokens.
_PARTS: dict[str, tuple[str | None, int]] = {
    "stem": (None, 8),
    "fork": ("stem", 4),
    "a": ("fork", 12),
    "b": ("fork", 12),
    "limb": ("stem", 8),
    "c": ("limb", 8),
    "d": ("limb", 8),
    "stem again": (None, 8),
    "e": ("stem again", 16),
}
_NUM_TEXT_TOKENS = 76  # of all parts but the second stem


@dataclass(frozen=True, slots=True, eq=False)
class CheckRow:
    """
    A row of two trees, with branches of different depth and a prefix that both trees begin with.

        stem (8) ─┬─ fork (4) ─┬─ a (12)
                  │            └─ b (12)
                  └─ limb (8) ─┬─ c (8)
                               └─ d (8)
        stem (8) ── e (16)

    Its samples have one length, so that they fill a batch without padding. Those that end with `b`, `d` and `e` are
    compared: other branches stand before and behind them. `a` and `b` have one shape: exchanged, each must compute
    what it computed in the other's place.
    """

    row: Row
    paths: NDArray[np.int64]  # (3, sample_length): where the tokens of each sample that is compared are in the row
    exchanged: NDArray[np.int64]  # (2, sample_length): the same for the samples that end with `a` and `b`

    @classmethod
    def from_tokens(
        cls, text: NDArray[np.int64], shown: Sequence[ShownImage] = (), *, is_exchanged: bool = False
    ) -> CheckRow:
        """
        Return a row of tokens of the data, `(num_tokens,)`, with one or two images in the place of the stems.

        Too few tokens are drawn several times. If `is_exchanged`, `a` and `b` change places, beside other tokens.
        """
        if len(text) < _NUM_TEXT_TOKENS:
            text = np.random.default_rng(0).choice(text, _NUM_TEXT_TOKENS)
        names = [name for name in _PARTS if name != "stem again"]
        cuts = np.cumsum([_PARTS[name][1] for name in names])
        tokens = dict(zip(names, np.split(text, cuts)[:-1], strict=True))
        if is_exchanged:
            tokens |= {"a": tokens["b"], "b": tokens["a"], "c": tokens["d"], "d": tokens["limb"]}
            tokens |= {"limb": tokens["e"][:8], "e": np.roll(tokens["e"], 3)}
        tokens["stem again"] = tokens["stem"]
        if shown:
            tokens["stem"], tokens["stem again"] = shown[0].token_ids, shown[-1].token_ids
        return cls._laid_out(tokens, shown)

    @classmethod
    def _laid_out(cls, tokens: dict[str, NDArray[np.int64]], shown: Sequence[ShownImage]) -> CheckRow:
        ends = dict(zip(_PARTS, np.cumsum([len(tokens[name]) for name in _PARTS]).tolist(), strict=True))
        places = {name: np.arange(end - len(tokens[name]), end) for name, end in ends.items()}
        last = dict(ends)
        for name, (parent, _) in reversed(_PARTS.items()):  # a part ends where the last part that continues it does
            if parent is not None:
                last[parent] = max(last[parent], last[name])
        length = ends["e"]
        features = None
        if shown:
            features = np.full(length, NO_FEATURE)
            features[places["stem"]] = shown[0].features
            second = shown[-1].features  # counted behind those of the first, if it is another image
            features[places["stem again"]] = np.where(
                second < 0, second, second + (len(shown) - 1) * (second.max() + 1)
            )
        row = Row(
            input_ids=np.concatenate([tokens[name] for name in _PARTS]),
            subtree_end=np.repeat([last[name] for name in _PARTS], [len(tokens[name]) for name in _PARTS]),
            token_parts=np.zeros(length, np.int64),
            token_weights=np.zeros(length),
            multiplicity=np.ones(length, np.int64),
            image_features=features,
            images=tuple(image.image for image in shown),
        )
        paths, exchanged = (
            np.stack([np.concatenate([places[name] for name in _line(leaf)]) for leaf in leaves])
            for leaves in ("bde", "ab")
        )
        return cls(row, paths, exchanged)

    @property
    def samples(self) -> list[Sample]:
        """The samples that are compared."""
        row = self.row
        return [
            Sample(
                row.input_ids[path],
                np.zeros(len(path)),
                1,
                image_features=None if row.image_features is None else row.image_features[path],
                images=row.images,
            )
            for path in self.paths
        ]

    @property
    def probes(self) -> NDArray[np.int64]:
        """The tokens of `b` and `d`, which foreign branches stand before and behind."""
        return np.concatenate([self.paths[0][-12:], self.paths[1][-8:]])

    @property
    def foreign(self) -> NDArray[np.int64]:
        """The tokens that no probe may depend on."""
        return np.setdiff1d(np.arange(len(self.row)), self.paths[:2])


@dataclass(frozen=True, slots=True, eq=False)
class ShownImage:
    """An image of the data with the tokens around it."""

    token_ids: NDArray[np.int64]  # (num_tokens,): its placeholders and a few tokens of text on both sides
    features: NDArray[np.int64]  # (num_tokens,): the feature that each token shows, counted from 0; -1 for text
    image: ImageReference  # where its pixels are

    @classmethod
    def smallest(
        cls, token_ids: NDArray[np.int64], features: NDArray[np.int64], images: tuple[ImageReference, ...]
    ) -> tuple[ShownImage, ...]:
        """Return the image of a row with the fewest features, and another of its size; none that needs company."""
        firsts = np.cumsum([0, *(image.num_features for image in images)])
        there = [j for j, image in enumerate(images) if firsts[j] in features and not image.in_company]
        fewest = min((images[j].num_features for j in there), default=0)
        smallest = [j for j in there if images[j].num_features == fewest]
        found = [cls._in_row(token_ids, features, images[j], int(firsts[j])) for j in smallest]
        return tuple(image for image in found if len(image.token_ids) == len(found[0].token_ids))[:2]

    @classmethod
    def _in_row(
        cls, token_ids: NDArray[np.int64], features: NDArray[np.int64], image: ImageReference, first: int
    ) -> ShownImage:
        last = first + image.num_features - 1
        start = int(np.flatnonzero(features == first)[0])
        end = start + int(np.flatnonzero(features[start:] == last)[0]) + 1
        # With the marks around it, but without those of its neighbours: they stand for images that are not there.
        is_other = (features >= 0) & ((features < first) | (features > last))
        others = np.flatnonzero(is_other)
        before = max(start - 2, int(others[others < start].max(initial=-2)) + 2, 0)
        after = min(end + 2, int(others[others >= end].min(initial=len(features) + 1)) - 1)
        own = features[before:after]
        return cls(token_ids[before:after], np.where(own < 0, NO_FEATURE, own - first), image)


def text_beside_images(token_ids: NDArray[np.int64], features: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the tokens of a row that neither stand for images nor mark where one begins or ends."""
    shows = features >= 0
    beside = np.zeros_like(shows)
    beside[:-1] |= shows[1:]
    beside[1:] |= shows[:-1]
    marks = np.unique(token_ids[beside & ~shows])
    return token_ids[~shows & ~np.isin(token_ids, marks)]


def _line(part: str | None) -> list[str]:
    """Return a part behind all that it continues."""
    return [] if part is None else [*_line(_PARTS[part][0]), part]
