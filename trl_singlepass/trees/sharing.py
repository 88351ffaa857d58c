"""Join rows into one that stores the common prefixes of conversations once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .image_features import image_of_feature, to_keys
from .prefix_tree import PrefixTree, lay_out
from .radix import RadixNode
from .rows import Row, TreePlan, number_images_together


# Shorter prefixes are repeated: attention to a shared prefix costs more than computing the tokens again.
MIN_SHARED_TOKENS = 32


def join_with_shared_prefixes(rows: Sequence[Row]) -> Row:
    """
    Return one row that holds the trees of several rows; those with the same first `MIN_SHARED_TOKENS` tokens are
    merged.

    Multiplicities and the loss weights of shared targets add up, so that loss and gradients are those of the separate
    rows. Merged trees stand where the first of their rows stood.
    """
    return Row.join([merge_rows([rows[i] for i in group]) for group in group_by_beginning(rows)])


def group_by_beginning(rows: Sequence[Row]) -> list[list[int]]:
    """Return the numbers of rows whose first `MIN_SHARED_TOKENS` tokens are the same, in groups; a row by itself."""
    groups: dict[bytes | int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_beginning(row) or index, []).append(index)
    return list(groups.values())


def shareable_length(is_trained: NDArray[np.bool_], subtree_end: NDArray[np.int64]) -> int:
    """
    Return how many tokens at the start of a row are guaranteed shareable with a row that begins with the same tokens.

    These are the tokens before the first fork and before the first one with a target: where two rows train different
    targets from one position, its token is stored twice. With `is_trained = [0, 0, 0, 1, 1]` in a row without forks,
    position 2 has the first target, and 2 tokens can be shared. Both arrays have shape `(num_tokens,)`.
    """
    if len(is_trained) == 0:
        return 0
    first, *branches = TreePlan.from_subtree_end(subtree_end).runs
    trained = np.flatnonzero(is_trained[: first.end])[:1].tolist()
    trained += [run.prefix[-1][1] for run in branches if run.prefix and is_trained[run.start]]
    return min(first.end, *(place - 1 for place in trained)) if trained else first.end


def merge_rows(rows: Sequence[Row]) -> Row:
    """Return one row that stores every prefix of several rows once, however short it is."""
    return rows[0] if len(rows) == 1 else Row.from_tree(merge_to_tree(rows)[0])


def merge_to_tree(rows: Sequence[Row]) -> tuple[PrefixTree, list[NDArray[np.int64]]]:
    """Return the tree of all prefixes of several rows, and for each row the keys of its tokens ([`to_keys`])."""
    has_images = any(row.image_features is not None for row in rows)
    features, images = number_images_together(rows) if has_images else ([None] * len(rows), None)
    keys = [to_keys(row.input_ids, of_row) for row, of_row in zip(rows, features, strict=True)]
    root = RadixNode.root()
    for index, (row, of_row) in enumerate(zip(rows, keys, strict=True)):
        for tree in _to_radix_trees(row, of_row, index):
            root.add(tree)
    return lay_out(root, images), keys


def _beginning(row: Row) -> bytes | None:
    """Return the first tokens of a row as a key, or `None` if it can share fewer than `MIN_SHARED_TOKENS`."""
    if shareable_length(row.token_weights > 0, row.subtree_end) < MIN_SHARED_TOKENS:
        return None
    tokens = row.input_ids[:MIN_SHARED_TOKENS].tobytes()
    shown = row.all_image_features()[:MIN_SHARED_TOKENS]
    images = image_of_feature(row.images)[shown[shown >= 0]] if row.images else ()
    return tokens + "".join(row.images[j].content for j in dict.fromkeys(images)).encode()


def _to_radix_trees(row: Row, keys: NDArray[np.int64], index: int) -> list[RadixNode]:
    """Return the trees of a row as radix trees, in which tokens that were stored once per target are merged again."""
    changes = (np.diff(row.subtree_end) != 0) | (np.diff(row.multiplicity) != 0)
    starts = [0, *(np.flatnonzero(changes) + 1).tolist()]
    ends = [*starts[1:], len(row)]
    parents = _parents(row.subtree_end, starts)
    weights, parts = row.token_weights, row.token_parts
    nodes = [
        RadixNode(keys[start:end], weights[start:end], parts[start:end], int(row.multiplicity[start]), index)
        for start, end in zip(starts, ends, strict=True)
    ]
    root = RadixNode.root()
    # From back to front, so that a node is complete when it is handed to its parent.
    for node, parent in zip(reversed(nodes), reversed(parents), strict=True):
        (root if parent < 0 else nodes[parent]).add(node)
    return root.children


def _parents(subtree_end: NDArray[np.int64], starts: list[int]) -> list[int]:
    """Return the index of each segment's parent, -1 at the start of a tree."""
    parents: list[int] = []
    path: list[int] = []
    for index, start in enumerate(starts):
        while path and subtree_end[starts[path[-1]]] <= start:
            path.pop()
        parents.append(path[-1] if path else -1)
        path.append(index)
    return parents
