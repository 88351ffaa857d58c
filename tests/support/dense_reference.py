"""Slow specification of attention on a tree: one score matrix per head, one pair of tokens at a time for the mask."""

import torch


def dense_mask(mask):
    """Return the whole mask of a tree, `(row_length, row_length)`: the rule at depths, among ancestors and itself."""
    depth, end = mask.tree.depth[0], mask.tree.subtree_end[0]
    position = torch.arange(len(depth), device=depth.device)
    is_ancestor = (position[None, :] <= position[:, None]) & (position[:, None] < end[None, :])
    zero = torch.zeros((), dtype=torch.long, device=depth.device)
    return mask.mask_function(zero, zero, depth[:, None], depth[None, :]) & is_ancestor


def dense_attention(inputs, visible):
    """
    Return attention of `AttentionInputs` under a mask of shape `(num_queries, num_keys)`.

    The output has the shape of a layer's, `(1, num_queries, heads, value_dim)`.
    """
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    heads = []
    for head, query in enumerate(inputs.query[0]):
        scores = query @ inputs.key[0, head // groups].T * inputs.scale
        if inputs.softcap is not None:
            scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
        weights = torch.where(visible, scores, -torch.inf).exp()  # float64 and small scores: no maximum to subtract
        total = weights.sum(-1, keepdim=True) + (0 if inputs.sinks is None else inputs.sinks[head].exp())
        heads.append(weights / total @ inputs.value[0, head // groups])
    return torch.stack(heads, 1)[None]
