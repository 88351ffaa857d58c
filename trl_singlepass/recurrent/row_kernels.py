"""
A recurrent layer on a whole row: only its convolution and its scan see the tree.

Projections, norms and gates take each token by itself, so they run once over the row, as in an ordinary batch. The two
kernels that mix tokens are names in transformers' modelling module. The layer's `forward` runs with these names bound
to the versions here:

- The convolution runs once, over the row with the last `kernel_size - 1` ancestors inserted before each branch.
- The scan runs over the pieces of [`fork_schedule`], each from the state of the piece before it. A kernel that keeps
  packed sequences apart takes them in two calls ([`PackedScan`]).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention.context import Tree
from ..attention.key_ranges import concatenated_ranges
from ..attention.row_group import RowGroup
from ..trees.rows import TreePlan
from .layout import Layout
from .schedule import fork_schedule, last_tokens


Kernel = Callable[..., Any]
Ints = NDArray[np.int64]

CONVOLUTION = "causal_conv1d_fn"


@dataclass(frozen=True, slots=True)
class ScanNames:
    """How a scan of transformers calls its arguments."""

    initial_state: str  # the state to start from, shape `(num_sequences, ...)`
    returns_state: str  # whether to return the final states too
    packs: bool  # whether fast kernels start each packed sequence (`cu_seqlens`) from a state of its own
    # Whether it returns `(output, None)` if no final state is asked for, instead of the output alone.
    returns_pair: bool


_DELTA_RULE = ScanNames("initial_state", "output_final_state", packs=True, returns_pair=True)
SCANS = {
    "torch_chunk_gated_delta_rule": _DELTA_RULE,
    "chunk_kimi_delta_attention": _DELTA_RULE,
    "mamba2_chunk_scan": ScanNames("initial_states", "return_final_states", packs=False, returns_pair=False),
}

# Mamba-2's convolution and scan in one kernel. It returns `None` where it is not installed, and the layer runs both.
FUSED = "mamba2_split_conv1d_scan_combined"


@dataclass(frozen=True, slots=True)
class RowKernels:
    """Kernels of a layer that mix tokens."""

    forward: FunctionType  # the layer's `forward`, which calls them
    scan: str | None  # name of the scan; `None` if the layer only convolves

    def run(self, layer: nn.Module, arguments: Mapping[str, object], tree: Tree) -> Any:
        """Run the layer on a row, with the arguments of its `forward`, but without a cache or a mask."""
        names = self.forward.__globals__
        of_packed_rows = set(arguments) - set(inspect.signature(self.forward).parameters)  # passed on to the kernels
        called: set[str] = set()

        def bind(name: str, run: Kernel) -> Kernel:
            def kernel(*args: object, **options: object) -> Any:
                called.add(name)
                return run(*args, **{key: value for key, value in options.items() if key not in of_packed_rows})

            return kernel

        bound = {CONVOLUTION: bind(CONVOLUTION, partial(_convolve, tree, names[CONVOLUTION]))}
        bound[FUSED] = lambda *args, **options: None
        if self.scan is not None:
            bound[self.scan] = bind(self.scan, partial(_scan, tree, names[self.scan], SCANS[self.scan]))
        forward = FunctionType(
            self.forward.__code__, {**names, **bound}, None, self.forward.__defaults__, self.forward.__closure__
        )
        forward.__kwdefaults__ = self.forward.__kwdefaults__
        output = forward(layer, **arguments)
        missing = {CONVOLUTION, self.scan} - called - {None}
        if missing:
            raise RuntimeError(
                f"{type(layer).__name__} did not call {sorted(map(str, missing))}, so its branches would be trained "
                "without their history. Use a version of transformers that README.md lists as known to work."
            )
        return output


def _convolve(
    tree: Tree, kernel: Kernel, /, hidden_states: Tensor, weight: Tensor, *args: object, **options: object
) -> Any:
    size = weight.shape[-1]
    layout = tree.make_once(("convolution", size), lambda: ConvolutionLayout(tree, size))
    run = on_share_of_channels(partial(layout.run, kernel), tree.group)
    return run(hidden_states, weight, *args, **options)


def _scan(tree: Tree, kernel: Kernel, names: ScanNames, /, *args: object, **options: object) -> Any:
    if names.packs and takes_packed_sequences(kernel):
        run = partial(tree.make_once(PackedScan, lambda: PackedScan(tree)).run, kernel)
    else:

        def make() -> Layout:
            return Layout(tree.plan.length, fork_schedule(tree.plan), tree.depth.device)

        run = partial(run_scan, kernel, names, tree.make_once("scan", make))
    return on_share_of_heads(run, tree.group, tree.plan.length)(*args, **options)


class ConvolutionLayout:
    """
    The row with ancestors inserted, so that one causal convolution sees each branch after its history.

    The row of [`schedule`] with a kernel of 3 tokens:

        gather_index     0 1 2 3 4 5 6   2 3 7 8   0 1 9 10
    """

    def __init__(self, tree: Tree, kernel_size: int) -> None:
        gathered, kept = insert_ancestors(tree.plan, kernel_size - 1)
        self.needs_zero = bool((gathered == tree.plan.length).any())
        both = torch.from_numpy(np.concatenate([gathered, kept])).to(tree.depth.device, non_blocking=True)
        self.gather_index, self.keep_index = torch.split(both, [len(gathered), len(kept)])

    def run(self, kernel: Kernel, hidden_states: Tensor, *args: object, **options: object) -> Tensor:
        """Run a causal convolution over `(1, channels, row_length)` along the paths of the tree."""
        tokens = hidden_states.squeeze(0).t()  # the channels of a token side by side, as the projection wrote them
        if self.needs_zero:
            tokens = F.pad(tokens, (0, 0, 0, 1))
        output: Tensor = kernel(tokens.index_select(0, self.gather_index).t()[None], *args, **options)
        return output.squeeze(0).t().index_select(0, self.keep_index).t()[None]


def insert_ancestors(plan: TreePlan, count: int) -> tuple[Ints, ...]:
    """
    Insert the last `count` ancestors of each run before it; `row_length` stands for zeros before a sample.

    Returns positions with the inserted ones, and where among them the tokens of the row are, both int64.
    """
    parts, kept, total = [], [], 0
    for run in plan.runs:
        ancestors = [position for ends in last_tokens(run.prefix, count) for position in range(*ends)]
        zeros = [plan.length] * (count - len(ancestors) if run.start else 0)
        parts += [np.array([*zeros, *ancestors], np.int64), np.arange(run.start, run.end)]
        total += len(zeros) + len(ancestors)
        kept.append(np.arange(total, total + run.end - run.start))
        total += run.end - run.start
    return np.concatenate(parts), np.concatenate(kept)


@cache
def takes_packed_sequences(kernel: Kernel) -> bool:
    """Whether a kernel keeps packed sequences apart: the closure of transformers' wrapper names what it takes."""
    try:
        accepted = inspect.getclosurevars(kernel).nonlocals.get("applicable_params")
    except TypeError:  # not a Python function
        accepted = None
    return "cu_seqlens" in (accepted or inspect.signature(kernel).parameters)


def run_scan(kernel: Kernel, names: ScanNames, layout: Layout, /, *args: object, **options: object) -> Any:
    """Run a scan with its arguments for the row, piece by piece; return what it does without a final state."""
    pieces = layout.schedule.pieces
    states: dict[int, Tensor] = {}
    outputs: list[Tensor] = []
    calls: list[Any] = layout.gather((args, options))
    for step, (tensors, call) in enumerate(calls):
        batch = layout.schedule.batches[step]
        sources = [states[pieces[index].source] for index in batch if pieces[index].starts_from_state]
        call[names.initial_state] = torch.cat(sources) if len(sources) > 1 else next(iter(sources), None)
        call[names.returns_state] = True
        output, state = kernel(*tensors, **call)
        outputs.append(output)
        if pieces[batch[0]].is_source:
            states[batch[0]] = state
    output = layout.scatter(outputs)
    return (output, None) if names.returns_pair else output


def on_share_of_channels(run: Kernel, group: RowGroup | None) -> Kernel:
    """Return a convolution by channel, `(1, channels, row_length)`, that takes this rank's part of a row."""
    if group is None:
        return run

    def convolve(hidden_states: Tensor, *args: object, **options: object) -> Tensor:
        channels = hidden_states.shape[1]

        def share(value: object) -> object:
            is_per_channel = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == channels
            return group.share_of_heads(value) if is_per_channel else value  # type: ignore[arg-type]

        row = group.to_heads(hidden_states.transpose(1, 2), channels).transpose(1, 2)
        shared = {name: share(value) for name, value in options.items()}
        output = run(row, *map(share, args), **shared)
        return group.to_tokens(output.transpose(1, 2), channels).transpose(1, 2)

    return convolve


def on_share_of_heads(run: Kernel, group: RowGroup | None, length: int) -> Kernel:
    """
    Return a scan that takes this rank's part of a row; `run` itself if no ranks share the row.

    `run` scans a whole row, `(1, row_length, heads, ...)`, where groups of heads may share one (`num_groups` of
    Mamba-2), with parameters of shape `(heads, ...)`, and returns its output, or a tuple that begins with it.
    """
    if group is None:
        return run
    num_tokens = length // group.size

    def scan(*args: object, **options: object) -> Any:
        values: list[Any] = [*args, *options.values()]
        heads = max(value.shape[2] for value in values if _is_per_token(value, num_tokens))

        def share(value: Any) -> Any:
            if _is_per_token(value, num_tokens):
                return group.to_heads(value, heads)
            is_per_head = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == heads
            return group.share_of_heads(value) if is_per_head else value

        output = run(*map(share, args), **{name: share(value) for name, value in options.items()})
        if isinstance(output, tuple):
            return (group.to_tokens(output[0], heads), *output[1:])
        return group.to_tokens(output, heads)

    return scan


def _is_per_token(value: Any, num_tokens: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 2 and value.shape[:2] == (1, num_tokens)


# Packed sequences ----------------------------------------------------------------------------------------------------


class PackedScan:
    """
    A gated delta rule on a whole row, in two calls of a kernel that keeps packed sequences apart.

    A row is cut wherever a branch leaves, and each piece starts from the state after its source, the piece before it:

        piece     0: [0, 2)   1: [2, 4)   2: [4, 7)   3: [7, 9)   4: [9, 11)
        source    none        0           1           1           0

    The state after a piece is linear in the state before it, `after = transfer @ before + own`. The first call runs
    the sources alone (0 and 1), each with two states side by side: zeros, which become `own`, and the identity, which
    becomes `transfer`. [`ComposeStates`] makes the states after all sources of them. The second call runs every piece.
    """

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
