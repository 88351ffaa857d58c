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
        labels (`numpy.ndarray` of `numpy.int64`):
            Rolled targets: `labels[i + 1]` is what position `i` must predict, -100 if nothing, so that a loss that
            shifts labels by one sees the right pairs. `labels[0]` is -100.
        loss_weights (`numpy.ndarray` of `numpy.float64`):
            Factor of the loss of each label; 0 where the label is -100.
        label_parts (`numpy.ndarray` of `numpy.int64`):
            What each label belongs to ([`Sample.token_parts`]); 0 where the label is -100.
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
    labels: NDArray[np.int64]
    loss_weights: NDArray[np.float64]
    label_parts: NDArray[np.int64]
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
    nodes, parents, targets = [], [], []
    for node, parent in depth_first(root):
        nodes.append(node)
        parents.append(parent)
        targets.append(_target_after(node))
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
    labels, loss_weights, label_parts = _roll_labels(nodes, targets, input_ids, starts, ends)
    return PrefixTree(
        input_ids=input_ids,
        position_ids=np.arange(len(input_ids)) + np.repeat(depths - starts, lengths),
        subtree_end=np.repeat(last_descendant, lengths),
        labels=labels,
        loss_weights=loss_weights,
        label_parts=label_parts,
        multiplicity=np.repeat(counts, lengths),
        segments=tuple(map(Segment, parents, starts.tolist(), ends.tolist(), depths.tolist(), counts.tolist())),
        image_features=None if images is None else features_of(keys),
        images=images or (),
    )


class _Target(NamedTuple):
    token: int
    weight: float
    part: int


_NO_TARGET = _Target(IGNORE_INDEX, 0.0, 0)


def _target_after(node: RadixNode) -> _Target:
    """Return the target of a node's last token, which its children hold."""
    trained = [child for child in node.children if child.weights[0] > 0]
    if not trained:
        return _NO_TARGET
    assert len({child.tokens[0] for child in trained}) == 1, "colliding targets must have been forked"
    weight = float(sum(child.weights[0] for child in trained))
    return _Target(int(tokens_of(trained[0].tokens[:1])[0]), weight, int(trained[0].parts[0]))


def _roll_labels(
    nodes: list[RadixNode],
    targets: list[_Target],
    input_ids: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    loss_weights = np.concatenate([node.weights for node in nodes])
    labels = np.where(loss_weights > 0, input_ids, IGNORE_INDEX)
    parts = np.where(loss_weights > 0, np.concatenate([node.parts for node in nodes]), 0)
    # What predicts the first token of a node is the node before it, whose children may be several.
    labels[starts], loss_weights[starts], parts[starts] = _NO_TARGET
    for target, end in zip(targets, ends, strict=True):
        if target.weight > 0:  # a node with a trained child is never the last one, so `end` is a valid position
            labels[end], loss_weights[end], parts[end] = target
    return labels, loss_weights, parts


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
