"""Rows that another project has packed as trees: from the depths of their tokens to the tree that a model takes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.row_tree import RowTree
from ..trees.rows import TreePlan


def tree_of_depths(position_ids: torch.Tensor) -> RowTree:
    """
    Return the tree of a row, on which a model runs it: `model(input_ids, position_ids=…, tree=tree_of_depths(…))`.

    `position_ids`, int64 of shape `(length,)` or `(1, length)`, holds the depth of each token in the order of a
    depth-first walk, as `TreeRow.pack` of TRL's AsyncGRPO lays it out. The depths `[0, 1, 2, 2, 1]` are a token with
    two children, the first of which has two. On an accelerator, this waits for them.

    Raises `ValueError` if a depth is larger by more than one than that of the token before it.
    """
    depths = position_ids.reshape(-1).cpu().numpy()
    if (np.diff(depths, prepend=-1) > 1).any():
        raise ValueError("position_ids are no depths of a depth-first walk. Give those that TreeRow.pack returns.")
    subtree_end = _subtree_ends(depths)
    on_device = torch.from_numpy(np.stack([subtree_end, depths, np.zeros_like(depths)])).to(position_ids.device)
    return RowTree(TreePlan.from_subtree_end(subtree_end), *on_device[:, None])


def _subtree_ends(depths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the position past the last descendant of each token: that of the next token that is no deeper."""
    ends, path = np.full(len(depths), len(depths)), list[int]()
    for position, depth in enumerate(depths.tolist()):
        ends[path[depth:]] = position
        path[depth:] = [position]
    return ends
