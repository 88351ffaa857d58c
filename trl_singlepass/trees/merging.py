"""Merge the samples of a conversation into a radix tree, each from where it leaves the one before."""

from __future__ import annotations

from .radix import RadixNode, common_prefix_length
from .sample import Sample


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
