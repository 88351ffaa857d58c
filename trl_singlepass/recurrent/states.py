"""
States of recurrent layers at the forks of a tree, and what of a layer crosses from row to row (waves).

Inside a row, autograd follows a state from fork to branch ([`ForkStates`]). Between rows, tensors are detached from
the graph of the row that made them. Gradients cross this cut by hand: later rows add theirs to [`BoundaryTensors`],
and the backward of the row that made the tensors collects them. Rows therefore run backward from the last to the
first.

Tokens with descendants in later rows have a **slot** each; in the plan of a row that continues them, slot `s` is
position `row_length + s`. Later rows replay the inputs of some of these tokens and start from the states after others,
depending on how a layer runs ([`ReplayMode`]). Only those are stored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..attention.context import Tree
from ..attention.kv_cache import is_in_backward
from ..trees.rows import TreePlan
from .schedule import ReplayMode, last_tokens


InputKey = tuple[str | int, ...]
"""Path to an input in a layer's arguments: `("position_embeddings", 0)` is the first entry of that tuple."""

StateName = tuple[str | int, ...]
"""Path to a state in a cache: index of the cache's layer, attribute, and the key where that is a dictionary."""


class ForkStates:
    """
    A cache of the class that is installed, for one layer and one batch of pieces, each of which continues a source.

    Everything is transformers' own but where tensors are kept: its caches write each state over the one before it, in
    place, and here a state that has been read stays as it was, so that gradients go through all of them. Layers of
    the cache are copied when they are asked for, from those of the sources or of an empty cache.
    """

    def __init__(self, empty: Any, sources: Sequence[ForkStates] = ()) -> None:
        known = sources[0]._layers if sources else {}
        self._layers: dict[int, Any] = {index: _continued(index, sources) for index in known}
        self._empty = empty
        self.cache = copy.copy(empty)
        self.cache.layers = _CopiedOnDemand(empty.layers, self._layers)

    def tensors(self) -> dict[StateName, Tensor]:
        """Return the states after the batch, shape `(batch, ...)` but for counts of tokens."""
        found: dict[StateName, Tensor] = {}
        for index, layer in self._layers.items():
            _copied(layer, lambda x, path, index=index: found.setdefault((index, *path), x))  # type: ignore[misc]
        return found

    def with_tensors(self, tensors: Mapping[StateName, Tensor]) -> ForkStates:
        """Return the same with other tensors, by name."""
        other = ForkStates(self._empty)
        for index, layer in self._layers.items():
            other._layers[index] = _copied(layer, lambda x, path, index=index: tensors[(index, *path)])  # type: ignore[misc]
        return other


class _CopiedOnDemand(list[Any]):
    """The layers of an empty cache, of which those in use are copies."""

    def __init__(self, empty: Iterable[Any], own: dict[int, Any]) -> None:
        super().__init__(empty)
        self._own = own

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            return super().__getitem__(index)
        if index not in self._own:
            self._own[index] = _copied(super().__getitem__(index), lambda x, path: x.clone())
        return self._own[index]


class _KeepingWhatWasRead(dict[Any, Any]):
    """A dictionary whose tensors are replaced when they are read, so that a change in place leaves what was read."""

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, Tensor):
            value = value.clone()
            self[key] = value
        return value


def _copied(layer: Any, change: Callable[[Tensor, InputKey], Tensor]) -> Any:
    """Return a copy of a layer of a cache with its tensors changed, also those in its dictionaries."""
    layer = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            own = {k: change(x, (name, k)) if isinstance(x, Tensor) else x for k, x in value.items()}
            vars(layer)[name] = _KeepingWhatWasRead(own)
        elif isinstance(value, Tensor):
            vars(layer)[name] = change(value, (name,))
    return layer


def _continued(index: int, sources: Sequence[ForkStates]) -> Any:
    """Return a layer of a cache whose batch is that of several sources, one after the other."""
    others = [source.tensors() for source in sources[1:]]

    def join(own: Tensor, path: InputKey) -> Tensor:
        joined = [own, *(tensors[(index, *path)] for tensors in others)]
        return torch.cat(joined) if others and own.dim() > 0 else own.clone()

    return _copied(sources[0]._layers[index], join)


class StateKey(NamedTuple):
    """Key of a state."""

    slot: int  # slot of the token after which the state holds
    name: StateName


Key = InputKey | StateKey


@dataclass(eq=False)
class BoundaryTensors:
    """Inputs and states of one layer that cross from row to row, with the gradients that later rows send back."""

    offload: bool = False  # whether to hold them on the CPU
    # Detached. Inputs have shape `(1, num_inputs, ...)`, states `(1, ...)`.
    values: dict[Key, Tensor] = field(default_factory=dict)
    # Those so far, at least in float32: every branch adds to those of the history.
    gradients: dict[Key, Tensor] = field(default_factory=dict)
    example: ForkStates | None = None  # a cache that holds states of the layer

    def store(self, key: Key, value: Tensor) -> None:
        """Store a tensor."""
        self.values[key] = value.detach().to("cpu" if self.offload else value.device)

    def add_gradient(self, key: Key, gradient: Tensor) -> None:
        """Add to the gradient of a tensor."""
        if key not in self.gradients:
            value = self.values[key]
            dtype = torch.promote_types(value.dtype, torch.float32)
            self.gradients[key] = torch.zeros_like(value, dtype=dtype)
        self.gradients[key] += gradient.to(self.gradients[key].device)

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors and gradients."""
        held = (*self.values.values(), *self.gradients.values())
        return sum(x.numel() * x.element_size() for x in held)


class AppendDetachedInputs(torch.autograd.Function):
    """Append stored inputs of tokens outside the row; its own `positions` are at `places` of them, for later rows."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, tensors: BoundaryTensors, key: InputKey, positions: Tensor, places: Tensor
    ) -> Tensor:
        """Concatenate both."""
        ctx.tensors, ctx.key, ctx.length, ctx.positions, ctx.places = tensors, key, value.shape[1], positions, places
        return torch.cat([value, tensors.values[key].to(value.device)], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Send gradients to earlier rows, and add what later rows sent to the gradients of this one."""
        own, outside = grads[0][:, : ctx.length], grads[0][:, ctx.length :]
        tensors: BoundaryTensors = ctx.tensors
        from_later_rows = tensors.gradients.get(ctx.key)
        if from_later_rows is not None and len(ctx.places):
            own = own.clone()
            own[:, ctx.positions] += from_later_rows[:, ctx.places].to(own)
        tensors.add_gradient(ctx.key, outside)
        return own, None, None, None, None


class LoadState(torch.autograd.Function):
    """Load the state after a token of an earlier row, to the device of any tensor that requires gradients."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensors: BoundaryTensors, key: StateKey) -> Tensor:
        """Return the state."""
        ctx.tensors, ctx.key = tensors, key
        return tensors.values[key].detach().to(anchor.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        """Send the gradient to the earlier row."""
        ctx.tensors.add_gradient(ctx.key, grads[0])
        return None, None, None


class CollectStateGradients(torch.autograd.Function):
    """Tie the states that a row stored to its layer's output, so that one backward goes through both."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, tensors: BoundaryTensors, keys: Sequence[StateKey], *states: Tensor
    ) -> Tensor:
        """Return the output."""
        ctx.tensors, ctx.keys = tensors, keys
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the output, and those that later rows sent for the states."""
        sent = [ctx.tensors.gradients.get(key) for key in ctx.keys]
        dtypes = [ctx.tensors.values[key].dtype for key in ctx.keys]
        own = [None if x is None else x.to(grads[0].device, d) for x, d in zip(sent, dtypes, strict=True)]
        return grads[0], None, None, *own


# Rows that continue others -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BoundarySlots:
    """Slots of which layers that run alike need anything."""

    inputs: NDArray[np.int64]  # slots of the tokens whose inputs are replayed, sorted
    states: frozenset[int]  # slots of the tokens whose states pieces start from

    @classmethod
    def from_plans(cls, plans: Iterable[TreePlan], mode: ReplayMode) -> BoundarySlots:
        """Collect the slots that rows need of a layer that runs over them in a mode."""
        inputs: set[int] = set()
        states: set[int] = set()
        for plan in plans:
            pieces = mode.schedule(plan).pieces
            replayed = [part for piece in pieces for part in piece.ranges]
            if mode.by_kernels and mode.reach is not None:
                replayed += [part for run in plan.runs for part in last_tokens(run.prefix, mode.reach)]
            for start, end in replayed:
                inputs.update(range(start - plan.length, end - plan.length) if start >= plan.length else ())
            states.update(piece.source_token - plan.length for piece in pieces if piece.source_token >= 0)
        return cls(np.array(sorted(inputs), np.int64), frozenset(states))


class RowBoundary:
    """What layers that run alike take from other rows and leave for them; `positions` are those of its slots."""

    def __init__(
        self,
        length: int,
        positions: Mapping[int, int],
        needed: BoundarySlots,
        tensors: Mapping[nn.Module, BoundaryTensors],
        stores: bool,
    ) -> None:
        self.length, self.needed, self.tensors, self.stores = length, needed, tensors, stores
        own = [(place, positions[slot]) for place, slot in enumerate(needed.inputs.tolist()) if slot in positions]
        self._own = {torch.device("cpu"): torch.tensor(own, dtype=torch.long).reshape(-1, 2).T.contiguous()}
        self.state_ends = {positions[slot] + 1: slot for slot in sorted(needed.states) if slot in positions}
        self._layers: set[nn.Module] = set()

    @property
    def num_outside(self) -> int:
        """Number of tokens outside the row whose inputs are appended to those of the row."""
        return len(self.needed.inputs)

    def locate(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the inputs of tokens are once those of `needed` slots are appended to the row's."""
        assert np.isin(positions[positions >= self.length] - self.length, self.needed.inputs).all()
        outside = self.length + np.searchsorted(self.needed.inputs, positions - self.length)
        return np.where(positions < self.length, positions, outside)

    def begin(self, layer: nn.Module) -> None:
        """Note that a layer runs; a second time raises `NotImplementedError`, as both would share what is stored."""
        if is_in_backward():  # a checkpointed layer runs again
            return
        if layer in self._layers:
            raise NotImplementedError(
                f"Waves (wave_tokens) do not work with this model: {type(layer).__name__} runs several times in a "
                "forward. Leave out wave_tokens."
            )
        self._layers.add(layer)

    def extend(self, layer: nn.Module, name: str, value: Any) -> Any:
        """Append to an argument, `(1, row_length, ...)`, what is stored of tokens outside; store what they need."""
        return map_tensors(value, lambda x, key: self._extend(self.tensors[layer], x, key), (name,))

    def _extend(self, tensors: BoundaryTensors, value: Tensor, key: InputKey) -> Tensor:
        if value.shape[:2] != (1, self.length):
            return value
        if key not in tensors.values:
            tensors.store(key, value.new_zeros(1, self.num_outside, *value.shape[2:]))
        stored = tensors.values[key]
        places, positions = self._own_on(stored.device)[0], self._own_on(value.device)[1]
        if self.stores:
            stored[:, places] = value.detach()[:, positions].to(stored.device)
        if not value.requires_grad:
            return torch.cat([value, stored.to(value.device)], dim=1)
        return AppendDetachedInputs.apply(value, tensors, key, positions, places)  # type: ignore[no-untyped-call, no-any-return]

    def _own_on(self, device: torch.device) -> Tensor:
        """Places among the stored inputs and positions in the row of the row's own, copied to a device once."""
        if device not in self._own:
            self._own[device] = self._own[torch.device("cpu")].to(device, non_blocking=True)
        return self._own[device]

    def load_states(self, layer: nn.Module, slot: int, device: torch.device) -> dict[StateName, Tensor]:
        """Return the states of a layer after the token of a slot, on the device of the layer's inputs."""
        tensors = self.tensors[layer]
        anchor = torch.zeros((), device=device, requires_grad=True)
        found = {key: x for key, x in tensors.values.items() if isinstance(key, StateKey) and key.slot == slot}
        assert found, "a state is stored before a row starts from it"
        return {
            key.name: LoadState.apply(anchor, tensors, key) if x.is_floating_point() else x.to(device)  # type: ignore[no-untyped-call]
            for key, x in found.items()
        }

    def store_states(self, layer: nn.Module, output: Any, states: Mapping[int, Mapping[StateName, Tensor]]) -> Any:
        """Store the states at `state_ends` for later rows; return the output, whose backward goes through them too."""
        if isinstance(output, tuple):
            return (self.store_states(layer, output[0], states), *output[1:])
        tensors = self.tensors[layer]
        own = {
            StateKey(slot, name): state for end, slot in self.state_ends.items() for name, state in states[end].items()
        }
        if self.stores:
            for key, state in own.items():
                tensors.store(key, state)
        own = {key: state for key, state in own.items() if state.is_floating_point()}
        if not own or not torch.is_grad_enabled():
            return output
        return CollectStateGradients.apply(output, tensors, list(own), *own.values())  # type: ignore[no-untyped-call]


@runtime_checkable
class HasBoundary(Protocol):
    """Tree of a row some of whose tokens have ancestors or descendants in other rows, as waves do."""

    def get_boundary(self, mode: ReplayMode) -> RowBoundary | None:
        """Return what layers that run this way take from other rows and leave for them; `None` if nothing."""


def get_boundary(tree: Tree, mode: ReplayMode) -> RowBoundary | None:
    """Return what layers that run in a mode take from other rows and leave for them; `None` for a row by itself."""
    return tree.make_once(
        ("boundary", mode), lambda: tree.get_boundary(mode) if isinstance(tree, HasBoundary) else None
    )


def map_tensors(value: Any, change: Callable[[Tensor, InputKey], Any], path: InputKey = ()) -> Any:
    """Return what a layer takes or returns with its tensors changed, also those in tuples and dictionaries."""
    if isinstance(value, dict):
        return {name: map_tensors(part, change, (*path, name)) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map_tensors(part, change, (*path, index)) for index, part in enumerate(value))
    return change(value, path) if isinstance(value, Tensor) else value
