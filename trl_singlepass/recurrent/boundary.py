"""What recurrent layers need of earlier rows and leave for later ones: inputs of tokens, and states after tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from ..trees.rows import TreePlan
from .boundary_grads import Key, Leaves, LeavingStates, Recalled, WithKept
from .fork_cache import ForkStates
from .layer_kinds import ReplayMode
from .schedule import Schedule


@dataclass(frozen=True)
class Kept:
    """
    What rows need of tokens outside of them, which have a slot each.

    Args:
        inputs (`numpy.ndarray` of `numpy.int64`):
            Slots of the tokens whose inputs to the layer run again, sorted.
        states (`frozenset[int]`):
            Slots of the tokens after which pieces start.
    """

    inputs: NDArray[np.int64]
    states: frozenset[int]

    @classmethod
    def by(cls, plans: Iterable[TreePlan], schedule: Callable[[TreePlan], Schedule]) -> Kept:
        """
        Collect it.

        Args:
            plans (`Iterable[TreePlan]`):
                Structure of the rows; positions from their length on are slots.
            schedule (`Callable`):
                Returns the pieces in which a layer runs over a row.
        """
        inputs: set[int] = set()
        states: set[int] = set()
        for plan in plans:
            for piece in schedule(plan).pieces:
                for start, end in piece.ranges:
                    inputs.update(range(start - plan.length, end - plan.length) if start >= plan.length else ())
                if piece.recalled >= 0:
                    states.add(piece.recalled - plan.length)
        return cls(np.array(sorted(inputs), np.int64), frozenset(states))


class Handover:
    """
    What layers that run alike need and leave while they run over one row.

    Args:
        length (`int`):
            Number of tokens of the row.
        slots (`Mapping[int, int]`):
            Position in the row of each token that has descendants in later rows, by its slot.
        kept (`Kept`):
            What any row needs.
        leaves (`Mapping[torch.nn.Module, Leaves]`):
            What is kept for each layer.
        writes (`bool`):
            Whether the row runs for the first time, so that nothing of it is kept yet.
    """

    def __init__(
        self,
        length: int,
        slots: Mapping[int, int],
        kept: Kept,
        leaves: Mapping[torch.nn.Module, Leaves],
        writes: bool,
    ) -> None:
        self.length, self.kept, self.leaves, self.writes = length, kept, leaves, writes
        own = [(place, slots[slot]) for place, slot in enumerate(kept.inputs.tolist()) if slot in slots]
        self.places, self.positions = torch.tensor(own, dtype=torch.long).reshape(-1, 2).unbind(1)
        self.state_ends = {slots[slot] + 1: slot for slot in sorted(kept.states) if slot in slots}

    def place_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where tokens stand in extended inputs: those of the row first, then those that are kept."""
        outside = self.length + np.searchsorted(self.kept.inputs, positions - self.length)
        return np.where(positions < self.length, positions, outside)

    def extended(self, layer: torch.nn.Module, value: Any, key: Key = ()) -> Any:
        """
        Add to an argument of a layer what is kept of the same argument, and keep what later rows need of it.

        Args:
            layer (`torch.nn.Module`):
                The layer.
            value (`Any`):
                Tensor with one entry per token, shape `(1, length, ...)`, or a tuple or dictionary of such; anything
                else is returned as it is.
            key (`tuple`, *optional*):
                Name of the argument.
        """
        if isinstance(value, dict):
            return {name: self.extended(layer, part, (*key, name)) for name, part in value.items()}
        if isinstance(value, tuple):
            return tuple(self.extended(layer, part, (*key, index)) for index, part in enumerate(value))
        if not isinstance(value, torch.Tensor) or value.shape[:2] != (1, self.length):
            return value
        leaves = self.leaves[layer]
        if key not in leaves.values:
            leaves.keep(key, value.new_zeros(1, len(self.kept.inputs), *value.shape[2:]))
        held = leaves.values[key]
        if self.writes:
            own = value.detach()[:, self.positions.to(value.device)]
            held[:, self.places.to(held.device)] = own.to(held.device)
        if not value.requires_grad:
            return torch.cat([value, held.to(value.device)], dim=1)
        return WithKept.apply(value, leaves, key, self.positions, self.places)  # type: ignore[no-untyped-call]

    def recall(self, layer: torch.nn.Module, slot: int, device: torch.device) -> ForkStates:
        """
        Return the states of a layer after a token of an earlier row.

        Args:
            layer (`torch.nn.Module`):
                The layer.
            slot (`int`):
                Slot of the token.
            device (`torch.device`):
                Device of the layer's inputs.
        """
        leaves, states = self.leaves[layer], ForkStates()
        anchor = torch.zeros((), device=device, requires_grad=True)
        keys = [key for key in leaves.values if key[:2] == (_STATE, slot)]
        states.final = {key[2]: Recalled.apply(anchor, leaves, key) for key in keys}  # type: ignore[no-untyped-call]
        assert states.final, "a state is kept before a row starts from it"
        return states

    def hand_on(self, layer: torch.nn.Module, output: Any, states: Mapping[int, ForkStates]) -> Any:
        """
        Keep the states that later rows start from.

        Args:
            layer (`torch.nn.Module`):
                The layer.
            output (`Any`):
                Its output for the row: a tensor, or a tuple whose first entry is one.
            states (`Mapping[int, ForkStates]`):
                States by the position just past the token after which they hold.

        Returns:
            `Any`: The output, whose backward also sends back what came for these states.
        """
        if isinstance(output, tuple):
            return (self.hand_on(layer, output[0], states), *output[1:])
        leaves = self.leaves[layer]
        tensors = {
            (_STATE, slot, name): state
            for end, slot in self.state_ends.items()
            for name, state in states[end].final.items()
        }
        if self.writes:
            for key, state in tensors.items():
                leaves.keep(key, state)
        if not tensors or not torch.is_grad_enabled():
            return output
        return LeavingStates.apply(output, leaves, list(tensors), *tensors.values())  # type: ignore[no-untyped-call]


@runtime_checkable
class HandsOver(Protocol):
    """Tree of a row whose ancestors ran in earlier rows, as waves make it."""

    def handover(self, mode: ReplayMode) -> Handover | None:
        """Return what layers that run alike need of ancestors that ran before."""


_STATE = "after token"  # no argument is called so
