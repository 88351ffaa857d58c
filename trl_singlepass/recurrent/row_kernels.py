"""
A recurrent layer on a whole row: only its convolution and its scan see the tree.

Projections, norms and gates take each token by itself, so they run once over the row, as in an ordinary batch. The two
kernels that mix tokens are functions of transformers. They are interposed: wherever the layer calls them, be it in a
helper, they run as follows while the layer runs on a row.

- The convolution runs once, over the row with the last `kernel_size - 1` ancestors inserted before each branch.
- The scan runs over the pieces of [`fork_schedule`], each from the state of the piece before it. A kernel that keeps
  packed sequences apart takes them in two calls ([`PackedScan`]).

Whether a layer can run this way is measured ([`measurement`]): it has to reach the kernels, and to give what it gives
along whole paths. A row that continues others (a wave) has the inputs of the convolution and the states after some
tokens from them ([`RowBoundary`]).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
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
from .scan_check import check_scan, keeps_sequences_apart
from .schedule import ReplayMode, fork_schedule, last_tokens
from .states import RowBoundary, StateName, get_boundary


Kernel = Callable[..., Any]
Ints = NDArray[np.int64]

CONVOLUTION = "causal_conv1d_fn"
# Mamba-2's convolution and scan in one kernel. It returns `None` where it is not installed, and the layer runs both.
FUSED = "mamba2_split_conv1d_scan_combined"
_STATE: StateName = ("scan",)  # under which the state of a scan is stored for other rows


@dataclass(frozen=True, slots=True)
class ScanNames:
    """How a scan of transformers calls its arguments."""

    initial_state: str  # the state to start from, shape `(num_sequences, ...)`
    returns_state: str  # whether to return the final states too
    is_delta_rule: bool  # whether states are linear in states before, so that [`PackedScan`] can compose them
    num_positional: int  # how many of its arguments it gets by position
    # Whether it returns `(output, None)` if no final state is asked for, instead of the output alone.
    returns_pair: bool


_DELTA_RULE = ScanNames("initial_state", "output_final_state", is_delta_rule=True, num_positional=3, returns_pair=True)
SCANS = {
    "torch_chunk_gated_delta_rule": _DELTA_RULE,
    "chunk_kimi_delta_attention": _DELTA_RULE,
    "mamba2_chunk_scan": ScanNames(
        "initial_states", "return_final_states", is_delta_rule=False, num_positional=5, returns_pair=False
    ),
}
"""Functions that are worth interposing. Of one that has another name in a release, layers run piece by piece."""


@dataclass(frozen=True, slots=True)
class RowKernels:
    """Kernels of a layer that mix tokens, by which it runs on whole rows."""

    called: frozenset[str]  # those that it called when it was measured
    mode: ReplayMode  # what they need of other rows, where a row continues some

    def run(self, layer: Any, arguments: Mapping[str, object], tree: Tree) -> Any:
        """Run the layer on a row, with the arguments of its `forward`, but without a cache or a mask."""
        boundary = get_boundary(tree, self.mode)
        if boundary is not None:
            boundary.begin(layer)
        own = _LayerRun(layer, tree, boundary)
        output = own.run(arguments)
        if missing := self.called - own.called:
            raise RuntimeError(
                f"{type(layer).__name__} did not call {sorted(missing)}, so its branches would be trained without "
                "their history. Call enable_tree again after a change of the model."
            )
        return output


def observe_kernels(layer: nn.Module, arguments: Mapping[str, object], tree: Tree) -> RowKernels:
    """Run a layer on a row by its kernels; return those that it calls. `ValueError` if it calls none."""
    own = _LayerRun(layer, tree, None)
    own.run(arguments)
    if not own.called:
        raise ValueError(f"{type(layer).__name__} calls none of {CONVOLUTION}, {', '.join(SCANS)}.")
    scans = not own.called.isdisjoint(SCANS)
    return RowKernels(frozenset(own.called), ReplayMode(scans, own.reach, by_kernels=True))


class _LayerRun:
    """One run of a layer over a row, with what it takes from other rows and leaves for them."""

    def __init__(self, layer: Any, tree: Tree, boundary: RowBoundary | None) -> None:
        self.layer, self.tree, self.boundary = layer, tree, boundary
        self.called: set[str] = set()
        self.reach = self._num_convolutions = 0
        self._of_packed_rows: set[str] = set()  # arguments that the layer passes on to its kernels

    def run(self, arguments: Mapping[str, object]) -> Any:
        """Run the layer."""
        forward = self.layer._stock_forward
        self._of_packed_rows = set(arguments) - set(inspect.signature(forward).parameters)
        token = _current.set(self)
        try:
            return forward(**arguments)
        finally:
            _current.reset(token)

    def call(self, name: str, kernel: Kernel, args: tuple[object, ...], options: dict[str, object]) -> Any:
        """Run a kernel of transformers for the row, however its arguments are passed."""
        if name == FUSED:
            return None
        self.called.add(name)
        positional, options = _bound(kernel, args, options, 2 if name == CONVOLUTION else SCANS[name].num_positional)
        options = {key: value for key, value in options.items() if key not in self._of_packed_rows}
        if name == CONVOLUTION:
            return self._convolve(kernel, *positional, **options)
        return self._scan(kernel, SCANS[name], *positional, **options)

    def _convolve(self, kernel: Kernel, hidden_states: Any, weight: Any, *args: object, **options: object) -> Any:
        size, name = weight.shape[-1], f"convolution {self._num_convolutions}"
        self._num_convolutions += 1
        self.reach = max(self.reach, size - 1)
        layout = self.tree.make_once(("convolution", size), lambda: ConvolutionLayout(self.tree, size, self.boundary))

        def extend(tokens: Tensor) -> Tensor:
            if self.boundary is None:
                return tokens
            extended: Tensor = self.boundary.extend(self.layer, name, tokens[None])
            return extended[0]

        run = on_share_of_channels(partial(layout.run, kernel, extend), self.tree.group)
        return run(hidden_states, weight, *args, **options)

    def _scan(self, kernel: Kernel, names: ScanNames, *args: Any, **options: Any) -> Any:
        tree = self.tree
        if names.is_delta_rule:
            check_scan(kernel, args, options)
        if names.is_delta_rule and keeps_sequences_apart(kernel, args, options):
            packed = tree.make_once(PackedScan, lambda: PackedScan(tree, self.boundary))
            run: Kernel = partial(packed.run, kernel, self)
        else:

            def make() -> Layout:
                ends = () if self.boundary is None else self.boundary.state_ends
                schedule = fork_schedule(tree.plan, ends, of_kernel=True)
                return Layout(tree.plan.length, schedule, tree.depth.device, shortest=1)

            run = partial(run_scan, kernel, names, tree.make_once("scan", make), self)
        return on_share_of_heads(run, tree.group, tree.plan.length)(*args, **options)

    def load_state(self, slot: int) -> Tensor:
        """Return the state after a token of another row, shape `(1, ...)`."""
        assert self.boundary is not None, "only a wave continues tokens outside its row"
        return self.boundary.load_states(self.layer, slot, self.tree.depth.device)[_STATE]

    def store_states(self, output: Tensor, states: Mapping[int, Tensor]) -> Tensor:
        """Store the states, by the position just past the token, that other rows continue; return the output."""
        if self.boundary is None:
            return output
        by_end = {end: {_STATE: states[end]} for end in self.boundary.state_ends}
        stored: Tensor = self.boundary.store_states(self.layer, output, by_end)
        return stored


def _bound(
    kernel: Kernel, args: tuple[object, ...], options: dict[str, object], count: int
) -> tuple[list[object], dict[str, object]]:
    """Return the first `count` arguments of a kernel, and the others by name, however they are passed."""
    # A function that `kernelize` may replace is a module.
    function: Any = inspect.unwrap(kernel)
    function = type(function).forward if isinstance(function, nn.Module) else function
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    given = dict(zip(names, args, strict=False)) | options
    return [given.pop(name) for name in names[:count]], given


# Interposed functions ------------------------------------------------------------------------------------------------

_current: ContextVar[_LayerRun | None] = ContextVar("trl_singlepass_layer_run", default=None)


class _Interposed:
    """A kernel of transformers that a layer's run on a row takes over; to everyone else, the kernel itself."""

    def __init__(self, name: str, kernel: Kernel) -> None:
        functools.update_wrapper(self, kernel, updated=())
        self.name, self.kernel = name, kernel

    def __call__(self, *args: object, **options: object) -> Any:
        run = _current.get()
        if run is None:
            return self.kernel(*args, **options)
        token = _current.set(None)  # a kernel may fall back to another one
        try:
            return run.call(self.name, self.kernel, args, options)
        finally:
            _current.reset(token)


def interpose_kernels(layer: nn.Module) -> bool:
    """Interpose the kernels that the code of a layer may call; return whether there are any."""
    found = False
    for module in _modules_of(type(layer)):
        for name in (CONVOLUTION, FUSED, *SCANS):
            kernel = vars(module).get(name)
            if not callable(kernel):
                continue
            interposed = kernel if isinstance(kernel, _Interposed) else _Interposed(name, kernel)
            found = True
            for other in _modules_of(type(layer)):
                for alias in [alias for alias, value in vars(other).items() if value is kernel]:
                    setattr(other, alias, interposed)
    return found


def _modules_of(cls: type) -> Iterator[Any]:
    """Yield the modules with the code of a class: those of its bases, and all beside them in a package."""
    names = {base.__module__ for base in cls.__mro__ if issubclass(base, nn.Module) and base is not nn.Module}
    packages = tuple(f"{name.rpartition('.')[0]}." for name in names if "." in name)
    for name, module in list(sys.modules.items()):
        if name in names or name.startswith(packages):
            yield module


# The convolution -----------------------------------------------------------------------------------------------------


class ConvolutionLayout:
    """
    The row with ancestors inserted, so that one causal convolution sees each branch after its history.

    The row of [`schedule`] with a kernel of 3 tokens:

        gather_index     0 1 2 3 4 5 6   2 3 7 8   0 1 9 10
    """

    def __init__(self, tree: Tree, kernel_size: int, boundary: RowBoundary | None) -> None:
        gathered, kept = insert_ancestors(tree.plan, kernel_size - 1)
        self.needs_zero = bool((gathered < 0).any())
        length = tree.plan.length
        if boundary is not None:
            gathered, length = boundary.locate(gathered), length + boundary.num_outside
        gathered = np.where(gathered < 0, length, gathered)
        both = torch.from_numpy(np.concatenate([gathered, kept])).to(tree.depth.device, non_blocking=True)
        self.gather_index, self.keep_index = torch.split(both, [len(gathered), len(kept)])

    def run(
        self,
        kernel: Kernel,
        extend: Callable[[Tensor], Tensor],
        hidden_states: Tensor,
        *args: object,
        **options: object,
    ) -> Tensor:
        """
        Run a causal convolution over `(1, channels, row_length)` along the paths of the tree; `extend` appends the
        inputs of tokens outside the row.
        """
        # The channels of a token side by side, as the projection wrote them.
        tokens = extend(hidden_states.squeeze(0).t())
        if self.needs_zero:
            tokens = F.pad(tokens, (0, 0, 0, 1))
        output: Tensor = kernel(tokens.index_select(0, self.gather_index).t()[None], *args, **options)
        return output.squeeze(0).t().index_select(0, self.keep_index).t()[None]


def insert_ancestors(plan: TreePlan, count: int) -> tuple[Ints, ...]:
    """
    Insert the last `count` ancestors of each run before it; -1 stands for zeros before a sample.

    Returns positions with the inserted ones, and where among them the tokens of the row are, both int64.
    """
    parts, kept, total = [], [], 0
    for run in plan.runs:
        ancestors = [position for ends in last_tokens(run.prefix, count) for position in range(*ends)]
        zeros = [-1] * (count - len(ancestors) if run.start else 0)
        parts += [np.array([*zeros, *ancestors], np.int64), np.arange(run.start, run.end)]
        total += len(zeros) + len(ancestors)
        kept.append(np.arange(total, total + run.end - run.start))
        total += run.end - run.start
    return np.concatenate(parts), np.concatenate(kept)


def run_scan(
    kernel: Kernel, names: ScanNames, layout: Layout, run: _LayerRun, /, *args: object, **options: object
) -> Any:
    """Run a scan with its arguments for the row, piece by piece; return what it does without a final state."""
    pieces = layout.schedule.pieces
    states: dict[int, Tensor] = {}
    outputs: list[Tensor] = []
    calls: list[Any] = layout.gather((args, options))
    for step, (tensors, call) in enumerate(calls):
        batch = layout.schedule.batches[step]
        sources = [
            states[piece.source] if piece.source >= 0 else run.load_state(piece.source_token - layout.length)
            for piece in (pieces[index] for index in batch)
            if piece.starts_from_state
        ]
        call[names.initial_state] = torch.cat(sources) if len(sources) > 1 else next(iter(sources), None)
        call[names.returns_state] = True
        output, state = kernel(*tensors, **call)
        outputs.append(output)
        if pieces[batch[0]].is_source:
            states[batch[0]] = state
    states_by_end = {pieces[index].ranges[-1][1]: state for index, state in states.items()}
    output = run.store_states(layout.scatter(outputs), states_by_end)
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

    def __init__(self, tree: Tree, boundary: RowBoundary | None = None) -> None:
        ends = () if boundary is None else boundary.state_ends
        pieces = fork_schedule(tree.plan, ends, of_kernel=True).pieces
        outside = sorted({piece.source_token for piece in pieces if piece.source_token >= 0})
        num_pieces, num_outside = len(pieces), len(outside)
        # A source in another row stands behind the pieces; -1 is none.
        behind = {token: num_pieces + i for i, token in enumerate(outside)}
        source = np.array([behind.get(piece.source_token, piece.source) for piece in pieces], np.int64)
        sources = np.flatnonzero([piece.is_source for piece in pieces])
        self.num_sources, self.length = len(sources), tree.plan.length
        self._outside = [token - self.length for token in outside]
        borders = np.array([*(piece.ranges[-1][0] for piece in pieces), self.length], np.int64)
        # Behind the sources stand the states from other rows, and one that is zero, from which all others start.
        none = len(sources) + num_outside
        place = np.full(num_pieces + num_outside + 1, none)
        place[sources] = np.arange(len(sources))
        place[num_pieces:-1] = len(sources) + np.arange(num_outside)
        self._states_by_end = {end: int(place[np.searchsorted(borders, end) - 1]) for end in ends}
        lengths = np.diff(borders)[sources]
        indices = [
            borders,
            place[source],
            concatenated_ranges(borders[sources], lengths),
            np.cumsum([0, *lengths]),
            *ancestors(np.concatenate([place[source[sources]], np.full(num_outside + 1, none)])),
        ]
        moved = torch.from_numpy(np.concatenate(indices)).to(tree.depth.device, non_blocking=True)
        self._borders, self._start, self._tokens, self._source_borders, *self._ancestors = torch.split(
            moved, [len(index) for index in indices]
        )

    def run(
        self, kernel: Callable[..., Any], run: _LayerRun, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        """Run a kernel of transformers with its arguments for the row, along the paths of the tree."""
        states = self._states(kernel, run, key, value, options)
        if states is not None:
            options = {**options, "initial_state": states.index_select(0, self._start)}
        if len(self._start) > 1:
            options = {**options, "cu_seqlens": self._borders}
        output = kernel(query, key, value, **options)[0]
        by_end = {end: states[place : place + 1] for end, place in self._states_by_end.items() if states is not None}
        return run.store_states(output, by_end), None

    def _states(
        self, kernel: Callable[..., Any], run: _LayerRun, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor | None:
        """
        Return the state after each source, those from other rows, and zeros, shape `(num_states, heads, key_dim,
        value_dim)`; `None` if all pieces start from nothing.
        """
        outside = [run.load_state(slot) for slot in self._outside]
        if not self.num_sources:
            return _then_zeros(outside) if outside else None
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
        own = kernel(key, key, value, **options)[1]
        if not self._ancestors:
            return _then_zeros([own, *outside])
        after = _then_zeros([own, *(F.pad(state, (0, key_dim)) for state in outside)])
        states: Tensor = ComposeStates.apply(*after.split([value_dim, key_dim], -1), self._ancestors)  # type: ignore[no-untyped-call]
        return states

    def _of_sources(self, value: Any) -> Any:
        """Return the tokens of the sources if a value is per token, `(1, row_length, ...)`."""
        is_per_token = isinstance(value, Tensor) and value.shape[:2] == (1, self.length)
        return value.index_select(1, self._tokens) if is_per_token else value


def _then_zeros(states: list[Tensor]) -> Tensor:
    """Return states, `(num_states, ...)` each, one after the other, with one more that is zero."""
    return F.pad(torch.cat(states) if len(states) > 1 else states[0], (0, 0) * 3 + (0, 1))


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
