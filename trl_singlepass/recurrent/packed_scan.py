"""
A gated delta rule on a whole row, in two calls of a kernel that keeps packed sequences apart.

A row is cut wherever a branch leaves, and each piece starts from the state after its source, the piece before it. The
row of [`schedule`]:

    piece     0: [0, 2)   1: [2, 4)   2: [4, 7)   3: [7, 9)   4: [9, 11)
    source    none        0           1           1           0

The state after a piece is linear in the state before it, `after = transfer @ before + own`. The first call runs the
sources alone (0 and 1), each with two states side by side: zeros, which become `own`, and the identity, which becomes
`transfer`. [`ComposeStates`] makes the states after all sources of them. The second call runs every piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..attention.context import Tree
from ..attention.key_ranges import concatenated_ranges
from ..trees.rows import TreePlan


Ints = NDArray[np.int64]


class PackedScan:
    """How a gated delta rule runs over a row; indices of pieces, on the device of the tree."""

    def __init__(self, tree: Tree) -> None:
        borders, source = cut_at_forks(tree.plan)
        sources = np.unique(source[source >= 0])
        self.num_sources, self.length = len(sources), tree.plan.length
        # Among the sources; what starts from nothing starts from one more, whose state is zero.
        place = np.full(len(source) + 1, len(sources))
        place[sources] = np.arange(len(sources))
        lengths = np.diff(borders)[sources]
        indices = [
            borders,
            place[source],
            concatenated_ranges(borders[sources], lengths),
            np.cumsum([0, *lengths]),
            *ancestors(np.append(place[source[sources]], len(sources))),
        ]
        moved = torch.from_numpy(np.concatenate(indices)).to(tree.depth.device, non_blocking=True)
        self._borders, self._start, self._tokens, self._source_borders, *self._ancestors = torch.split(
            moved, [len(index) for index in indices]
        )

    def run(
        self, kernel: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        """Run a kernel of transformers with its arguments for the row, along the paths of the tree."""
        if self.num_sources:
            states = self._states(kernel, key, value, options)
            options = {**options, "initial_state": states.index_select(0, self._start)}
        if len(self._start) > 1:
            options = {**options, "cu_seqlens": self._borders}
        return kernel(query, key, value, **options)[0], None

    def _states(self, kernel: Callable[..., Any], key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """Return the state after each source, and zeros, `(num_sources + 1, heads, key_dim, value_dim)`."""
        options = {name: self._of_sources(option) for name, option in options.items()} | {"output_final_state": True}
        key, value = self._of_sources(key), self._of_sources(value)
        heads, value_dim, key_dim = *value.shape[2:], key.shape[-1]
        if self._ancestors:
            dtype = torch.promote_types(value.dtype, torch.float32)
            identity = F.pad(torch.eye(key_dim, dtype=dtype, device=value.device), (value_dim, 0))
            options["initial_state"] = identity.expand(self.num_sources, heads, -1, -1)
            value = F.pad(value, (0, key_dim))
        if self.num_sources > 1:
            options["cu_seqlens"] = self._source_borders
        after = F.pad(kernel(key, key, value, **options)[1], (0, 0) * 3 + (0, 1))
        if not self._ancestors:
            return after
        states: Tensor = ComposeStates.apply(*after.split([value_dim, key_dim], -1), self._ancestors)  # type: ignore[no-untyped-call]
        return states

    def _of_sources(self, value: Any) -> Any:
        """Return the tokens of the sources if a value is per token, `(1, row_length, ...)`."""
        is_per_token = isinstance(value, Tensor) and value.shape[:2] == (1, self.length)
        return value.index_select(1, self._tokens) if is_per_token else value


def cut_at_forks(plan: TreePlan) -> tuple[Ints, Ints]:
    """Return the borders of the pieces of a row, `(num_pieces + 1,)`, and the source of each, -1 for none."""
    forks = {run.prefix[-1][1] for run in plan.runs if run.prefix}
    starts = {run.start: run.prefix[-1][1] if run.prefix else 0 for run in plan.runs}
    borders = sorted({*forks, *starts, plan.length})
    ending_at = {end: piece for piece, end in enumerate(borders[1:])}
    source = [ending_at.get(starts.get(start, start), -1) for start in borders[:-1]]
    return np.array(borders, np.int64), np.array(source, np.int64)


def ancestors(parent: Ints) -> list[Ints]:
    """
    Return the ancestor 1, 2, 4, … steps up, as long as any has one; the last entry stands for none.

    The chain 0, 1, 2 with the parents `3 0 1 3` has `3 0 1 3` and, two steps up, `3 3 0 3`.
    """
    found = []
    while (parent[:-1] < len(parent) - 1).any():
        found.append(parent)
        parent = parent[parent]
    return found


def _in_own_precision(state: Tensor) -> AbstractContextManager[object]:
    """Keep autocast from rounding products of states."""
    kind = state.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class ComposeStates(torch.autograd.Function):
    """
    States after pieces that start from one another: `state = transfer @ state of parent + own`.

    Takes `own`, `(num_pieces, heads, key_dim, value_dim)`, `transfer`, `(num_pieces, heads, key_dim, key_dim)`, and
    the [`ancestors`] of the pieces; those of the last one are zero. After each doubling, `transfer` leads from the
    state so many steps up, and the state has what was added since. In backward, the same steps lead down.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, transfer: Tensor, steps: Sequence[Tensor]) -> Tensor:
        """Return the states, shaped as `own`."""
        with _in_own_precision(own):
            state, power = own, transfer
            for doubling, step in enumerate(steps):
                if doubling:
                    power = power @ power.index_select(0, steps[doubling - 1])
                state = state + power @ state.index_select(0, step)
        ctx.save_for_backward(state, transfer)
        ctx.steps = steps
        return state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of `own` and `transfer`."""
        state, power = ctx.saved_tensors
        steps: Sequence[Tensor] = ctx.steps
        with _in_own_precision(state):
            grad = grads[0]
            for doubling, step in enumerate(steps):
                if doubling:
                    power = power @ power.index_select(0, steps[doubling - 1])
                grad = grad.index_add(0, step, power.mT @ grad)
            return grad, grad @ state.index_select(0, steps[0]).mT, None
