"""The prefix tree: samples merged on their shared prefixes and laid out depth first in one token sequence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .image_features import ImageReference, features_of, to_keys, tokens_of
from .radix import RadixNode, SampleMerger, depth_first
from .sample import Sample


IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Segment:
    """Longest range of tokens that the same samples share."""

    parent: int  # index of the segment that this one continues, -1 at the start of a tree
    start: int  # position of the first token
    end: int  # position just past the last token
    depth: int  # of the first token: the number of its ancestors
    num_samples: int  # samples that pass through the segment (its multiplicity)


class Targets(NamedTuple):
    """
    What each position of a row must predict, rolled by one: entry `i + 1` is about what position `i` predicts, so that
    a loss that shifts labels by one sees the right pairs. Nothing is predicted by entry 0.

    All arrays have shape `(num_tokens,)`.
    """

    labels: NDArray[np.int64]
    """Token that is predicted, -100 if there is none."""
    loss_weights: NDArray[np.float64]
    """Factor of the loss of each label, 0 without one."""
    label_parts: NDArray[np.int64]
    """What each label belongs to ([`Sample.token_parts`]), 0 without one."""


@dataclass(frozen=True, slots=True, eq=False)
class PrefixTree:
    """
    Samples merged on their shared prefixes, each distinct prefix stored once, laid out depth first.

    Two prefixes are the same if their tokens are, and the images that these show.

    At a fork, the child on the trunk comes first and the branches follow, so that the history lies together at the
    front. A token's descendants follow it without a gap, so `subtree_end` holds the whole structure: position `j` is
    an ancestor of `i`, or `i` itself, exactly when `j <= i < subtree_end[j]`.

    Where samples train different targets from one position, the tree forks one token earlier and stores that token
    once per target, so that every position has at most one target. Where several samples train the same target, their
    loss weights add up, as they do in N-pass. Samples `[1, 2, 3]` and `[1, 2, 4, 5]` that train all tokens but the
    first two:

        position        0     1     2     3     4     5
        input_ids       1     2     4     5     2     3
        position_ids    0     1     2     3     1     2
        subtree_end     6     4     4     4     6     6
        token_weights   0     0     1     1     0     1
        labels       -100  -100     4     5  -100     3
        multiplicity    2     1     1     1     1     1

    All arrays have shape `(num_tokens,)`.

    Args:
        input_ids (`numpy.ndarray` of `numpy.int64`):
            Tokens.
        position_ids (`numpy.ndarray` of `numpy.int64`):
            Depth of each token, as RoPE needs it.
        subtree_end (`numpy.ndarray` of `numpy.int64`):
            Position just past the last descendant of each token.
        token_parts (`numpy.ndarray` of `numpy.int64`):
            What each token belongs to ([`Sample.token_parts`]), 0 if it is not trained.
        token_weights (`numpy.ndarray` of `numpy.float64`):
            Factor of the loss of predicting each token from the one before it on its path; 0 if it is not trained.
        multiplicity (`numpy.ndarray` of `numpy.int64`):
            Number of samples that pass through each token.
        segments (`tuple[Segment, ...]`):
            Segments in the order of their positions.
        image_features (`numpy.ndarray` of `numpy.int64`, *optional*):
            Feature that each token shows, as in its samples, -1 for text; `None` without images.
        images (`tuple[ImageReference, ...]`, *optional*):
            The images of the samples, in the order of their features.

    Source: generalises the hand-made mask of arXiv 2504.18246 (section 3) to any set of samples. Forking one token
    early follows `TreeRow` of TRL's AsyncGRPO, which always does it.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    subtree_end: NDArray[np.int64]
    token_parts: NDArray[np.int64]
    token_weights: NDArray[np.float64]
    multiplicity: NDArray[np.int64]
    segments: tuple[Segment, ...]
    image_features: NDArray[np.int64] | None = None
    images: tuple[ImageReference, ...] = ()

    @classmethod
    def from_samples(cls, samples: Sequence[Sample]) -> PrefixTree:
        """
        Merge samples into a prefix tree (a forest if their first tokens differ).

        Args:
            samples (`Sequence[Sample]`):
                Samples in the order of their turns, of one conversation if they have images. The order does not change
                the loss; where equally many samples share several children, the trunk follows the last sample.

        Returns:
            `PrefixTree`: The tree.

        Raises:
            `ValueError`: If there are no samples.
        """
        if not samples:
            raise ValueError("A prefix tree needs at least one sample, got none.")
        merger = SampleMerger()
        for index, sample in enumerate(samples):
            merger.add(sample, index)
        return lay_out(merger.finish(), _images_of(samples))

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> Targets:
        """What each position must predict."""
        forks = [
            (each.start, self.segments[each.parent].end)
            for each in self.segments
            if each.parent >= 0 and each.start != self.segments[each.parent].end
        ]
        return roll_targets(self.input_ids, self.token_parts, self.token_weights, forks)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Rolled labels ([`Targets`]), shape `(num_tokens,)`."""
        return self.targets.labels

    @property
    def num_sample_tokens(self) -> int:
        """Number of tokens in all samples: what N-pass computes."""
        return int(self.multiplicity.sum())

    @property
    def sharing_factor(self) -> float:
        """Tokens in all samples ÷ tokens in the tree."""
        return self.num_sample_tokens / len(self)


def _images_of(samples: Sequence[Sample]) -> tuple[ImageReference, ...] | None:
    """Return the images of a conversation, which all its samples name; `None` if no sample shows any."""
    if all(sample.image_features is None for sample in samples):
        return None
    images = {sample.images for sample in samples}
    assert len(images) == 1, "samples of one tree must number the same images"
    return images.pop()


def lay_out(root: RadixNode, images: tuple[ImageReference, ...] | None = None) -> PrefixTree:
    """Return a radix tree laid out in one token sequence; this changes the radix tree."""
    nodes, parents = zip(*depth_first(root), strict=True)
    lengths = np.array([len(node.tokens) for node in nodes])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    depths = np.zeros(len(nodes), np.int64)
    last_descendant = ends.copy()
    for i, parent in enumerate(parents):
        depths[i] = depths[parent] + lengths[parent] if parent >= 0 else 0
    for i in range(len(nodes) - 1, -1, -1):
        if parents[i] >= 0:
            last_descendant[parents[i]] = max(last_descendant[parents[i]], last_descendant[i])
    counts = np.array([node.num_samples for node in nodes])
    keys = np.concatenate([node.tokens for node in nodes])
    input_ids = tokens_of(keys)
    weights = np.concatenate([node.weights for node in nodes])
    parts = np.concatenate([node.parts for node in nodes])
    return PrefixTree(
        input_ids=input_ids,
        position_ids=np.arange(len(input_ids)) + np.repeat(depths - starts, lengths),
        subtree_end=np.repeat(last_descendant, lengths),
        token_parts=np.where(weights > 0, parts, 0),
        token_weights=weights,
        multiplicity=np.repeat(counts, lengths),
        segments=tuple(map(Segment, parents, starts.tolist(), ends.tolist(), depths.tolist(), counts.tolist())),
        image_features=None if images is None else features_of(keys),
        images=images or (),
    )


def roll_targets(
    input_ids: NDArray[np.int64],
    token_parts: NDArray[np.int64],
    token_weights: NDArray[np.float64],
    forks: Sequence[tuple[int, int]],
) -> Targets:
    """
    Return what each position of a row must predict, from which of its tokens are trained.

    The arrays have shape `(num_tokens,)`. `forks` holds, for each branch, the position of its first token and the one
    just past the token that it continues. With `forks = [(4, 1)]`, the token at 4 follows the one at 0: if it is
    trained, its label stands at 1. Of the tokens that continue another one, at most one is trained.
    """
    starts, places = np.array(forks, np.int64).reshape(-1, 2).T
    is_trained = token_weights > 0
    places, trained = places[is_trained[starts]], starts[is_trained[starts]]
    assert not is_trained[places].any(), "colliding targets must have been forked"
    labels = np.where(is_trained, input_ids, IGNORE_INDEX)
    weights, parts = token_weights.copy(), token_parts.copy()
    labels[starts], weights[starts], parts[starts] = IGNORE_INDEX, 0, 0
    labels[places], weights[places], parts[places] = input_ids[trained], token_weights[trained], token_parts[trained]
    return Targets(labels, weights, parts)


def sample_paths(tree: PrefixTree, samples: Sequence[Sample]) -> list[NDArray[np.int64]]:
    """Return, for each sample of a tree, the positions of its tokens."""
    return find_paths(tree, [to_keys(sample.token_ids, sample.image_features) for sample in samples])


def find_paths(tree: PrefixTree, sequences: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Return, for each sequence of tokens that a tree holds, given by their keys ([`to_keys`]), their positions."""
    children: dict[int, list[int]] = defaultdict(list)
    for index, segment in enumerate(tree.segments):
        children[segment.parent].append(index)
    keys = to_keys(tree.input_ids, tree.image_features)

    def last_segment(tokens: NDArray[np.int64]) -> int:
        # Copies of a token that had different targets look alike until the tokens after them are compared.
        stack = children[-1][::-1]
        while stack:
            index = stack.pop()
            segment = tree.segments[index]
            part = tokens[segment.depth : segment.depth + segment.end - segment.start]
            if np.array_equal(keys[segment.start : segment.start + len(part)], part):
                if segment.depth + len(part) == len(tokens):
                    return index
                stack += children[index][::-1]
        raise AssertionError("every sample must be a path of its tree")

    def path(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        ranges, index = [], last_segment(tokens)
        while index >= 0:
            segment = tree.segments[index]
            ranges.append(np.arange(segment.start, segment.end))
            index = segment.parent
        return np.concatenate(ranges[::-1])[: len(tokens)]

    return list(map(path, sequences))
