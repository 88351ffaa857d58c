"""
What a layer takes from rows that ran before, and leaves for rows that run after.

Tokens with descendants in later rows (waves) have a **slot** each; in the plan of a row that continues them, slot `s`
is position `row_length + s`. Later rows replay the inputs of some of these tokens and start from the states after
others, depending on how a layer runs ([`ReplayMode`]). Only those are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..attention.kv_cache import is_in_backward
from ..trees.rows import TreePlan
from .schedule import ReplayMode, Schedule
from .states import (
    AppendDetachedInputs,
    BoundaryTensors,
    CollectStateGradients,
    ForkStates,
    InputKey,
    LoadState,
    StateKey,
)


@dataclass(frozen=True)
class BoundarySlots:
    """Slots of which layers that run alike need anything."""

    inputs: NDArray[np.int64]  # slots of the tokens whose inputs are replayed, sorted
    states: frozenset[int]  # slots of the tokens whose states pieces start from

    @classmethod
    def from_plans(cls, plans: Iterable[TreePlan], schedule: Callable[[TreePlan], Schedule]) -> BoundarySlots:
        """Collect the slots that rows need; `schedule` returns the pieces in which a layer runs over a row."""
        inputs: set[int] = set()
        states: set[int] = set()
        for plan in plans:
            for piece in schedule(plan).pieces:
                for start, end in piece.ranges:
                    inputs.update(range(start - plan.length, end - plan.length) if start >= plan.length else ())
                if piece.source_token >= 0:
                    states.add(piece.source_token - plan.length)
        return cls(np.array(sorted(inputs), np.int64), frozenset(states))


class RowBoundary:
    """
    What layers that run alike take from other rows and leave for them while they run over one row.

    `positions` maps the slot of each token of the row that has descendants in later rows to its position; `needed` has
    the slots that any row needs. The row `stores` its tensors if it runs for the first time.
    """

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
        """
        Return where the inputs of tokens are once those from outside the row are appended.

        In a row of 4 tokens where slots 2 and 5 are replayed, positions `[1, 6, 9]` are token 1, slot 2 and slot 5:
        indices `[1, 4, 5]`.
        """
        outside = self.length + np.searchsorted(self.needed.inputs, positions - self.length)
        return np.where(positions < self.length, positions, outside)

    def begin(self, layer: nn.Module) -> None:
        """
        Note that a layer runs.

        Raises `NotImplementedError` if it runs several times in a forward: its runs would share what is stored.
        """
        if is_in_backward():  # a checkpointed layer runs again
            return
        if layer in self._layers:
            raise NotImplementedError(
                f"Waves (wave_tokens) do not work with this model: {type(layer).__name__} runs several times in a "
                "forward. Leave out wave_tokens."
            )
        self._layers.add(layer)

    def extend(self, layer: nn.Module, name: str, value: object) -> object:
        """
        Append to a layer's argument what is stored of it for tokens outside the row, and store what later rows need.

        The argument holds tensors of shape `(1, row_length, ...)`. Other values are returned as they are.
        """
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

    def load_states(self, layer: nn.Module, slot: int, device: torch.device) -> ForkStates:
        """Return the states of a layer after the token of a slot, on the device of the layer's inputs."""
        tensors, states = self.tensors[layer], ForkStates()
        anchor = torch.zeros((), device=device, requires_grad=True)
        keys = [key for key in tensors.values if isinstance(key, StateKey) and key.slot == slot]
        states.final = {key.name: LoadState.apply(anchor, tensors, key) for key in keys}  # type: ignore[no-untyped-call]
        assert states.final, "a state is stored before a row starts from it"
        return states

    def store_states(self, layer: nn.Module, output: Any, states: Mapping[int, ForkStates]) -> Any:
        """
        Store the states that later rows start from, and return the layer's output for the row.

        States are given by the position just past the token after which they hold. The output is a tensor, or a tuple
        whose first entry is one. Its backward also goes through these states, with the gradients that later rows sent
        back.
        """
        if isinstance(output, tuple):
            return (self.store_states(layer, output[0], states), *output[1:])
        tensors = self.tensors[layer]
        own = {
            StateKey(slot, name): state
            for end, slot in self.state_ends.items()
            for name, state in states[end].final.items()
        }
        if self.stores:
            for key, state in own.items():
                tensors.store(key, state)
        if not own or not torch.is_grad_enabled():
            return output
        return CollectStateGradients.apply(output, tensors, list(own), *own.values())  # type: ignore[no-untyped-call]


@runtime_checkable
class HasBoundary(Protocol):
    """Tree of a row some of whose tokens have ancestors or descendants in other rows, as waves do."""

    def get_boundary(self, mode: ReplayMode) -> RowBoundary | None:
        """Return what layers that run this way take from other rows and leave for them; `None` if nothing."""


def map_tensors(value: Any, change: Callable[[Tensor, InputKey], Any], path: InputKey = ()) -> Any:
    """Return what a layer takes or returns with its tensors changed, also those in tuples and dictionaries."""
    if isinstance(value, dict):
        return {name: map_tensors(part, change, (*path, name)) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map_tensors(part, change, (*path, index)) for index, part in enumerate(value))
    return change(value, path) if isinstance(value, Tensor) else value
