"""Radix tree of samples, each merged from where it leaves the one before; `prefix_tree` lays it out depth first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .image_features import to_keys
from .sample import Sample
from .shared_array import common_prefix_length


@dataclass(slots=True, eq=False)
class RadixNode:
    """
    Node of a radix tree: tokens that the same samples share. Its children begin with different ones.

    The root has no tokens: it precedes the first token of every sample.
    """

    # (num_tokens,), int64; with images, each together with the feature that it shows ([`to_keys`])
    tokens: NDArray[np.int64]
    # (num_tokens,), float64: loss weight of predicting each token from those before it, summed over the samples
    weights: NDArray[np.float64]
    # (num_tokens,), int64: [`Sample.token_parts`] of each token in the first sample that trains it, if any does
    parts: NDArray[np.int64]
    num_samples: int  # samples that pass through the node
    latest_sample: int  # index of the last of them
    children: list[RadixNode] = field(default_factory=list)

    @classmethod
    def root(cls) -> RadixNode:
        """Return the root of an empty tree."""
        return cls(np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64), 0, -1)

    @classmethod
    def from_sample(cls, sample: Sample, index: int, start: int = 0) -> RadixNode:
        """Return the tokens of a sample from position `start` on as one node."""
        features = None if sample.image_features is None else sample.image_features[start:]
        keys = to_keys(sample.tokens.tail(start), features)
        return cls(keys, sample.weights.tail(start), sample.token_parts_from(start), 1, index)

    @property
    def num_copies(self) -> int:
        """How many times more its last token is stored: once per target, where its children train different ones."""
        targets = sum(child.weights[0] > 0 for child in self.children)
        return max(int(targets) - 1, 0) * (len(self.tokens) > 0)

    def find_child(self, token: int) -> RadixNode | None:
        """Return the child that begins with a token, if there is one."""
        for child in self.children:
            if child.tokens[0] == token:
                return child
        return None

    def split(self, length: int) -> None:
        """Move all but the first `length` tokens into a new child, the only one."""
        rest = RadixNode(*self._arrays(slice(length, None)), self.num_samples, self.latest_sample, self.children)
        self.tokens, self.weights, self.parts = self._arrays(slice(length))
        self.children = [rest]

    def _arrays(self, where: slice) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        return self.tokens[where], self.weights[where], self.parts[where]

    def add(self, branch: RadixNode) -> None:
        """
        Merge a branch and everything below it into the children; shared tokens are stored once, their weights add up.

        A node `[1, 2, 3]` that is given `[1, 2, 4, 5]` splits into `[1, 2]` with the children `[3]` and `[4, 5]`.

        The branch becomes part of the tree and must not be used afterwards.
        """
        stack = [(self, branch, 0)]
        while stack:
            parent, node, start = stack.pop()
            child = parent.find_child(node.tokens[start])
            if child is None:
                node.tokens, node.weights, node.parts = node._arrays(slice(start, None))
                parent.children.append(node)
                continue
            end = start + common_prefix_length(child.tokens, node.tokens[start:])
            if end - start < len(child.tokens):
                child.split(end - start)
            child._add_shared(node, slice(start, end))
            if end < len(node.tokens):
                stack.append((child, node, end))
            else:
                stack += [(child, grandchild, 0) for grandchild in node.children]

    def _add_shared(self, node: RadixNode, where: slice) -> None:
        """Add the weights and samples of another node, whose tokens `where` are this node's."""
        self.add_weights(0, node.weights[where], node.parts[where])
        self.num_samples += node.num_samples
        self.latest_sample = max(self.latest_sample, node.latest_sample)

    def add_weights(self, start: int, weights: NDArray[np.float64], parts: NDArray[np.int64]) -> None:
        """Add the weights of a sample that has the node's tokens from position `start` on."""
        if not np.count_nonzero(weights):  # most shared tokens are history, which has no weight
            return
        where = slice(start, start + len(weights))
        self.weights, self.parts = self.weights.copy(), self.parts.copy()
        own_weights, own_parts = self.weights[where], self.parts[where]
        own_parts[:] = np.where((own_weights == 0) & (weights > 0), parts, own_parts)
        own_weights += weights


def depth_first(root: RadixNode) -> Iterator[tuple[RadixNode, int]]:
    """
    Yield every node with the index of its parent, the child on the trunk before its siblings.

    Where children train different targets, the node forks one token earlier; this changes the tree. The index counts
    nodes in the order of this generator; it is -1 below the root, which is not yielded itself.
    """
    count = 0
    stack = [(node, -1) for node in _trunk_last(_fork_colliding(root.children))]
    while stack:
        node, parent = stack.pop()
        node.children = _fork_colliding(node.children)
        yield node, parent
        stack.extend((child, count) for child in _trunk_last(node.children))
        count += 1


def _trunk_last(children: list[RadixNode]) -> list[RadixNode]:
    return sorted(children, key=lambda child: (child.num_samples, child.latest_sample))


def _fork_colliding(children: list[RadixNode]) -> list[RadixNode]:
    """Replace each child whose last token would have several targets by one copy per target."""
    return [part for child in children for part in _fork_one_token_earlier(child)]


def _fork_one_token_earlier(node: RadixNode) -> list[RadixNode]:
    """
    Store a node's last token once per target where its children train different ones.

    `[1, 2]` with the trained children `[3]` and `[4, 5]` becomes `[1]` with the children `[2, 3]` and `[2, 4, 5]`.
    """
    targets = list(dict.fromkeys(child.tokens[0] for child in node.children if child.weights[0] > 0))
    if len(targets) < 2:
        return [node]
    groups = [[child for child in node.children if child.tokens[0] == target] for target in targets]
    groups.sort(key=lambda group: _trunk_last(group)[-1].num_samples, reverse=True)
    # Children that no sample trains need no copy of their own.
    groups[0] += [child for child in node.children if child.tokens[0] not in targets]
    copies = [_copy_of_last_token(node, group, is_first=i == 0) for i, group in enumerate(groups)]
    if len(node.tokens) == 1:
        # A copy that was joined with its only child ends where that child ends, and may have to fork there in turn.
        return _fork_colliding(copies)
    node.tokens, node.weights, node.parts = node._arrays(slice(-1))
    node.children = copies
    return [node]


def _copy_of_last_token(node: RadixNode, children: list[RadixNode], *, is_first: bool) -> RadixNode:
    """Copy for one target. The first copy has the token's own loss weight, and the samples that end on the token."""
    num_samples = sum(child.num_samples for child in children)
    if is_first:
        num_samples += node.num_samples - sum(child.num_samples for child in node.children)
    weights = node.weights[-1:] if is_first else np.zeros(1)
    latest = max(child.latest_sample for child in children)
    if len(children) == 1 and children[0].num_samples == num_samples:
        (child,) = children
        tokens = np.concatenate([node.tokens[-1:], child.tokens])
        parts = np.concatenate([node.parts[-1:], child.parts])
        return RadixNode(tokens, np.concatenate([weights, child.weights]), parts, num_samples, latest, child.children)
    return RadixNode(node.tokens[-1:], weights, node.parts[-1:], num_samples, latest, children)


class SampleMerger:
    """
    A radix tree that grows by one sample at a time.

    Where a sample shares tokens with the one before it ([`SharedArray`]), they are neither compared nor counted again:
    the time per sample is that of its own tokens, however long the history is. Until [`finish`], a node counts the
    samples that end with it.

    With `[1, 2, 3]` in the tree, `[1, 2, 4, 5]` that shares two tokens with it begins inside the node `[1, 2, 3]`, at
    offset 2: the node is split there, and `[4, 5]` becomes the second child of `[1, 2]`.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        """Number of tokens that the tree has in the layout."""
        self._root = RadixNode.root()
        # The nodes of the sample before, each with the number of tokens before it.
        self._path: list[tuple[RadixNode, int]] = [(self._root, 0)]
        self._last: Sample | None = None

    def add(self, sample: Sample, index: int) -> None:
        """Merge a sample into the tree."""
        start = self._go_back(sample)
        node, begin = self._path[-1]
        new, at, offset = RadixNode.from_sample(sample, index, start), 0, start - begin
        touched, copies = [node], node.num_copies
        while True:
            shared = common_prefix_length(node.tokens[offset:], new.tokens[at:])
            part = slice(at, at + shared)
            node.add_weights(offset, new.weights[part], new.parts[part])
            at, offset = at + shared, offset + shared
            if offset < len(node.tokens):
                self._split(node, offset)
                touched.append(node.children[0])
            if at == len(new.tokens):
                node.num_samples, node.latest_sample = node.num_samples + 1, index
                break
            child = node.find_child(new.tokens[at])
            if child is None:
                new.tokens, new.weights, new.parts = new.tokens[at:], new.weights[at:], new.parts[at:]
                node.children.append(new)
                self._path.append((new, start + at))
                self.num_tokens += len(new.tokens)
                break
            self._path.append((child, start + at))
            touched.append(child)
            copies += child.num_copies
            node, offset = child, 0
        self.num_tokens += sum(node.num_copies for node in touched) - copies
        self._last = sample

    def finish(self) -> RadixNode:
        """Return the root of the tree. No sample can be added any more."""
        nodes = [self._root]
        for node in nodes:  # grows along the way: parents stand before their children
            nodes += node.children
        for node in reversed(nodes):
            for child in node.children:
                node.num_samples += child.num_samples
                node.latest_sample = max(node.latest_sample, child.latest_sample)
        return self._root

    def _go_back(self, sample: Sample) -> int:
        """Return where a sample is read from, and leave the nodes on the path that it does not reach for certain."""
        start = 0
        if self._last is not None and sample.image_features is None:
            # Tokens with a weight of their own are visited.
            start = min(sample.tokens.shared_length(self._last.tokens), sample.weights.kept)
        while len(self._path) > 1 and self._path[-1][1] >= start:
            self._path.pop()
        return start

    def _split(self, node: RadixNode, offset: int) -> None:
        node.split(offset)
        node.num_samples, node.latest_sample = 0, -1
