"""Radix tree under construction: what samples share is stored once, before it is laid out in a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .sample import Sample


@dataclass(slots=True, eq=False)
class RadixNode:
    """
    Run of tokens of a radix tree; the children of a node begin with different tokens.

    Args:
        tokens (`numpy.ndarray` of shape `(num_tokens,)`, `numpy.int64`):
            Tokens; none at the root, which stands before the first token of every sample.
        weights (`numpy.ndarray` of shape `(num_tokens,)`, `numpy.float64`):
            For each token, the loss weight of predicting it from the tokens before it, summed over the samples.
        parts (`numpy.ndarray` of shape `(num_tokens,)`, `numpy.int64`):
            For each token, what it is part of ([`Sample.token_parts`]); of the first sample that trains it, if any.
        num_samples (`int`):
            Number of samples that pass through the node.
        latest_sample (`int`):
            Number of the latest of them.
        children (`list[RadixNode]`, *optional*):
            Nodes that continue it.
    """

    tokens: NDArray[np.int64]
    weights: NDArray[np.float64]
    parts: NDArray[np.int64]
    num_samples: int
    latest_sample: int
    children: list[RadixNode] = field(default_factory=list)

    @classmethod
    def root(cls) -> RadixNode:
        """Return the root of an empty tree."""
        return cls(np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64), 0, -1)

    @classmethod
    def of_sample(cls, sample: Sample, number: int) -> RadixNode:
        """Return a sample as one node."""
        return cls(sample.token_ids, sample.loss_weights, sample.token_parts, 1, number)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the tree below the node, itself included, once it is laid out."""
        count, stack = len(self.tokens), [self]
        while stack:
            node = stack.pop()
            targets = sum(child.weights[0] > 0 for child in node.children)
            # At a fork, the token before it is stored once per target.
            count += max(int(targets) - 1, 0) * (len(node.tokens) > 0)
            count += sum(len(child.tokens) for child in node.children)
            stack += node.children
        return count

    def child(self, token: int) -> RadixNode | None:
        """Return the child that begins with a token."""
        for child in self.children:
            if child.tokens[0] == token:
                return child
        return None

    def split(self, length: int) -> None:
        """Move all but the first `length` tokens to a new only child."""
        rest = RadixNode(*self._arrays(slice(length, None)), self.num_samples, self.latest_sample, self.children)
        self.tokens, self.weights, self.parts = self._arrays(slice(length))
        self.children = [rest]

    def _arrays(self, where: slice) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        return self.tokens[where], self.weights[where], self.parts[where]

    def add(self, branch: RadixNode) -> None:
        """
        Merge a branch, with all below it, into the children; what both hold is stored once, weights add up.

        Args:
            branch (`RadixNode`):
                Continues this node. It is taken over and must not be used afterwards.
        """
        stack = [(self, branch, 0)]
        while stack:
            parent, node, start = stack.pop()
            child = parent.child(node.tokens[start])
            if child is None:
                node.tokens, node.weights, node.parts = node._arrays(slice(start, None))
                parent.children.append(node)
                continue
            end = start + common_prefix_length(child.tokens, node.tokens[start:])
            if end - start < len(child.tokens):
                child.split(end - start)
            child._take(node, slice(start, end))
            if end < len(node.tokens):
                stack.append((child, node, end))
            else:
                stack += [(child, grandchild, 0) for grandchild in node.children]

    def _take(self, node: RadixNode, where: slice) -> None:
        """Add a stretch of the same tokens of another node; most of it is history, which carries no weight."""
        _, weights, parts = node._arrays(where)
        if np.count_nonzero(weights):
            self.parts = np.where((self.weights == 0) & (weights > 0), parts, self.parts)
            self.weights = self.weights + weights
        self.num_samples += node.num_samples
        self.latest_sample = max(self.latest_sample, node.latest_sample)


def common_prefix_length(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Return how many tokens two sequences have in common at their start."""
    length = min(len(a), len(b))
    if length == 0:
        return 0
    differs = a[:length] != b[:length]
    first = int(differs.argmax())
    return first if differs[first] else length


def depth_first(root: RadixNode) -> Iterator[tuple[RadixNode, int]]:
    """
    Yield every node with the index of its parent, the child that continues the spine before its siblings.

    Where children train different targets, the node is forked one token earlier on the way; the tree is used up.

    Args:
        root (`RadixNode`):
            Root of the tree, which is not yielded.

    Yields:
        `tuple[RadixNode, int]`: A node, and the number of the yielded node that it continues; -1 if none.
    """
    count = 0
    stack = [(node, -1) for node in _spine_last(_fork_colliding(root.children))]
    while stack:
        node, parent = stack.pop()
        node.children = _fork_colliding(node.children)
        yield node, parent
        stack.extend((child, count) for child in _spine_last(node.children))
        count += 1


def _spine_last(children: list[RadixNode]) -> list[RadixNode]:
    return sorted(children, key=lambda child: (child.num_samples, child.latest_sample))


def _fork_colliding(children: list[RadixNode]) -> list[RadixNode]:
    """Replace each child whose last token would have several targets by one copy per target."""
    return [part for child in children for part in _fork_one_token_earlier(child)]


def _fork_one_token_earlier(node: RadixNode) -> list[RadixNode]:
    targets = list(dict.fromkeys(child.tokens[0] for child in node.children if child.weights[0] > 0))
    if len(targets) < 2:
        return [node]
    groups = [[child for child in node.children if child.tokens[0] == target] for target in targets]
    groups.sort(key=lambda group: _spine_last(group)[-1].num_samples, reverse=True)
    # Children that no sample trains need no copy of their own.
    groups[0] += [child for child in node.children if child.tokens[0] not in targets]
    copies = [_copy_of_last_token(node, group, is_first=i == 0) for i, group in enumerate(groups)]
    if len(node.tokens) == 1:
        # A copy that was joined with its only child ends where that child ended, and may fork there in turn.
        return _fork_colliding(copies)
    node.tokens, node.weights, node.parts = node._arrays(slice(-1))
    node.children = copies
    return [node]


def _copy_of_last_token(node: RadixNode, children: list[RadixNode], *, is_first: bool) -> RadixNode:
    """Copy for one target; the first one carries the weight of predicting the token and the samples that end on it."""
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
