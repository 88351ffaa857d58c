"""N-pass of one attention layer: each branch of a tree as a sequence of its own, by the formulas, in any precision."""

from dataclasses import dataclass

import numpy as np
import torch

from trl_singlepass.attention.context import Tree
from trl_singlepass.attention.interface import AttentionInputs
from trl_singlepass.trees.rows import TreePlan


VISIBLE = {
    "causal": lambda query, key, size: key <= query,
    "window": lambda query, key, size: (key <= query) & (query - key < size),
    "chunk": lambda query, key, size: (key <= query) & (query // size == key // size),
}
"""Whether a query sees a key, by their positions in the sequence."""


@dataclass(frozen=True)
class Branches:
    """A row in which a history grows and every turn is a branch of it, and the positions of each sequence."""

    tree: Tree
    paths: list
    first_met: list
    """Which tokens of each path are in no path before it."""


def branches_of(length, turns, history_share=0.25):
    """Return a row of this length: history, branch, more history, branch, …, as depth first order has it."""
    shares = np.tile([history_share, 1 - history_share], turns)
    borders = np.concatenate([[0], np.cumsum(shares) / turns * length]).round().astype(int)
    assert (np.diff(borders) > 0).all()
    end, history, paths, first_met = np.full(length, length), np.empty(0, dtype=int), [], []
    for start, fork, stop in zip(borders[:-1:2], borders[1::2], borders[2::2], strict=True):
        end[fork:stop] = stop
        paths.append(np.concatenate([history, np.arange(start, stop)]))
        first_met.append(np.arange(len(history), len(history) + stop - start))
        history = np.concatenate([history, np.arange(start, fork)])
    plan = TreePlan.from_subtree_end(end)
    tree = Tree(plan, torch.from_numpy(end)[None], torch.from_numpy(plan.depths())[None])
    return Branches(tree, paths, first_met)


def npass_output_and_gradients(inputs, branches, kind, size, grad_output):
    """
    Return `[out, gradients of queries, keys, values and, if there are any, sinks]` in float64.

    Sequence by sequence and key-value head by key-value head, in the dtype of the inputs but for the softmax, as
    transformers' "eager" computes it. What sequences share is added up in float64.
    """
    tensors = [inputs.query, inputs.key, inputs.value, *([] if inputs.sinks is None else [inputs.sinks])]
    out = torch.zeros(grad_output.shape, dtype=torch.float64, device=grad_output.device)
    totals = [torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in tensors]
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    for path, new in zip(branches.paths, branches.first_met, strict=True):
        index = torch.from_numpy(path).to(inputs.query.device)
        for head in range(inputs.key.shape[1]):
            heads = slice(head * groups, (head + 1) * groups)
            places = [(0, heads, index), (0, head, index), (0, head, index), heads][: len(tensors)]
            leaves = [x.detach()[place].requires_grad_() for x, place in zip(tensors, places, strict=True)]
            result = _sequence(inputs, leaves, kind, size)[:, new]
            place = (0, index[new], heads)
            out[place] = result.detach().transpose(0, 1).double()
            grads = torch.autograd.grad(result, leaves, grad_output[place].transpose(0, 1).to(result.dtype))
            for total, where, grad in zip(totals, places, grads, strict=True):
                total[where] += grad.double()
    return [out, *totals]


def _sequence(inputs, leaves, kind, size):
    """Attention of one sequence for the query heads of one key-value head, `(heads, length, value_dim)`."""
    query, key, value, *sinks = leaves
    scores = query @ key.T * inputs.scale
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    position = torch.arange(len(key), device=key.device)
    scores = scores.masked_fill(~VISIBLE[kind](position[:, None], position[None, :], size), -torch.inf)
    if sinks:
        scores = torch.cat([scores, sinks[0][:, None, None].expand(-1, len(key), 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return weights[..., : len(key)] @ value


def random_layer(branches, heads, kv_heads, head_dim, dtype, softcap=None, sinks=False):
    """Return random `AttentionInputs`, the same in any dtype, and a gradient of the output."""
    generator, length = torch.Generator().manual_seed(branches.tree.plan.length), branches.tree.plan.length

    def draw(*shape):  # rounded to bfloat16, so that every dtype starts from the same numbers
        return torch.randn(*shape, generator=generator).bfloat16().to(dtype)

    query, key, value = (draw(1, count, length, head_dim).requires_grad_() for count in (heads, kv_heads, kv_heads))
    logits = draw(heads).requires_grad_() if sinks else None
    return AttentionInputs(query, key, value, 2 * head_dim**-0.5, softcap, logits), draw(1, length, heads, head_dim)
