"""A wave as the tree that layers receive, and what its layers store for later waves."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ...attention.context import Tree
from ...attention.kv_cache import KVCache, KVCacheView, LayerSlots, SlotRanges, is_in_backward
from ...attention.offload import HostCopies
from ...recurrent.boundary import BoundarySlots, RowBoundary
from ...recurrent.schedule import ReplayMode, last_tokens
from ...recurrent.states import BoundaryTensors
from ...trees.rows import Ranges, TreePlan
from .plan import Wave
from .subplan import RangeMap, make_subplan


class GroupCache:
    """
    What the waves of a group store for one another, by layer, with the gradients that come back.

    Every token with descendants in later waves has a slot: slots count these tokens in row order. Of the slots, each
    layer stores what it needs.

    Takes the waves of the group in row order. With `offload`, the cache is on the CPU.
    """

    def __init__(self, row: TreePlan, waves: Sequence[Wave], offload: bool = False) -> None:
        self.row = row
        self.slots = RangeMap.consecutive(tokens for wave in waves for tokens in wave.handed_on)
        self.offload = offload
        self._copies: dict[torch.device, HostCopies] = {}
        self._alike: defaultdict[int, list[KVCache]] = defaultdict(list)
        self.kv_caches: dict[tuple[torch.nn.Module, int], KVCache] = {}
        self.inputs_and_states: defaultdict[torch.nn.Module, BoundaryTensors] = defaultdict(
            lambda: BoundaryTensors(offload)
        )
        self._waves = waves
        self._window_slots: dict[int | None, NDArray[np.int64]] = {None: np.arange(len(self.slots))}
        self._boundary_slots: dict[ReplayMode, BoundarySlots] = {}

    @cached_property
    def _plans(self) -> list[TreePlan]:
        """Plan of each wave, all of whose tokens run."""
        whole = (RangeMap.consecutive(((wave.start, wave.end),)) for wave in self._waves)
        return [make_subplan(self.row, tokens, self.slots) for tokens in whole]

    def get_kv_cache(self, layer: torch.nn.Module, call: int, slots: NDArray[np.int64]) -> KVCache:
        """
        Return the keys and values of one call of an attention layer.

        `call` is how often the layer attended before in the same forward: most do once, but DiffLlama's do twice, with
        other values, and looped models run a layer again. `slots` are those that it stores, from [`get_window_slots`].
        """
        if (layer, call) not in self.kv_caches:
            copies = self._copies_for if self.offload else None
            self.kv_caches[layer, call] = KVCache(len(slots), copies, self._alike[id(slots)])
        return self.kv_caches[layer, call]

    def _copies_for(self, device: torch.device) -> HostCopies:
        if device not in self._copies:
            self._copies[device] = HostCopies(device)
        return self._copies[device]

    def get_window_slots(self, local_size: int | None) -> NDArray[np.int64]:
        """
        Return the slots that an attention layer looks back to, sorted; `local_size` as in [`Tree.kv_cache`].

        In the example of `plan.py` with `wave_tokens=5`, branches start after tokens 3 and 1. A layer that sees only a
        token and the one before it needs slots 1 and 3 of the four.
        """
        if local_size not in self._window_slots:
            assert local_size is not None
            seen = {
                slot
                for plan in self._plans
                for run in plan.runs
                for first, last in last_tokens(run.prefix, local_size - 1)
                if first >= plan.length
                for slot in range(first - plan.length, last - plan.length)
            }
            self._window_slots[local_size] = np.array(sorted(seen), np.int64)
        return self._window_slots[local_size]

    def get_boundary_slots(self, mode: ReplayMode) -> BoundarySlots:
        """Return the slots that layers which run this way need."""
        if mode not in self._boundary_slots:
            self._boundary_slots[mode] = BoundarySlots.from_plans(self._plans, mode.schedule)
        return self._boundary_slots[mode]

    def get_handed_on(self, tokens: RangeMap, wave: Wave) -> SlotRanges:
        """
        Return the slots of the tokens that a wave hands on.

        `tokens` says where the tokens that run are in the sequence that runs.
        """
        return tuple(
            (*own, slot[0])
            for first, last in wave.handed_on
            for own, slot in zip(tokens.locate(first, last), self.slots.locate(first, last), strict=True)
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values, inputs, states and gradients."""
        held = (x for layer in self.kv_caches.values() for x in (layer.kv, layer.grad))
        keys_and_values = sum(x.numel() * x.element_size() for x in held if x is not None)
        return keys_and_values + sum(tensors.num_bytes for tensors in self.inputs_and_states.values())


@dataclass(eq=False)
class WaveTree(Tree):
    """
    Tree of a forward over some tokens of a row, whose other ancestors are in a cache.

    Positions of its plan from `plan.length` on are slots of the cache (see [`make_subplan`]). Its tensors have shape
    `(1, num_tokens)`, with an entry for each token that runs.

    Depths are those in the row; for `subtree_end`, only descendants that run as well count. If ranks share the row,
    the tokens that run are padded with one more chain.
    """

    cache: GroupCache | None = None  # what the layers have stored of ancestors that do not run
    row: Tree | None = None  # the tree of the whole row
    running: RangeMap | None = None  # the tokens that run
    handed_on: SlotRanges = ()  # tokens that later waves descend from
    stores: bool = False  # whether these tokens run for the first time
    _layer_slots: dict[int | None, LayerSlots] = field(default_factory=dict, init=False, repr=False)
    _calls: Counter[torch.nn.Module] = field(default_factory=Counter, init=False, repr=False)

    @classmethod
    def from_wave(cls, wave: Wave, tokens: Ranges, cache: GroupCache, row: Tree, *, stores: bool) -> WaveTree:
        """
        Return the tree of a forward over some tokens of a wave: all of them, or those that it hands on.

        `cache` is that of the wave's group, `row` the tree of the whole row. Tokens that run for the first time are
        stored.
        """
        running = RangeMap.consecutive(tokens)
        num_tokens = len(running)
        length = num_tokens if row.group is None else row.group.padded_length(num_tokens)
        plan = make_subplan(cache.row, running, cache.slots, length)
        end = (select(row.subtree_end, tokens) - tokens[0][0]).clamp(max=num_tokens)
        if len(tokens) > 1:  # a path: all later tokens descend from earlier ones
            end = torch.full_like(end, num_tokens)
        depth = select(row.depth, tokens)
        if padding := length - num_tokens:
            end = F.pad(end, (0, padding), value=length)
            depth = torch.cat([depth, torch.arange(padding, device=depth.device)[None]], dim=1)
        handed_on = cache.get_handed_on(running, wave)
        return cls(plan, end, depth, row.group, cache, row, running, handed_on, stores)

    @cached_property
    def image_plan(self) -> TreePlan:
        """The plan whose images are runs of their own: part of that of the row, which is checked as a whole."""
        assert self.cache is not None
        assert self.row is not None
        assert self.running is not None
        return make_subplan(self.row.image_plan, self.running, self.cache.slots, self.plan.length)

    def kv_cache(self, layer: torch.nn.Module, local_size: int | None = None) -> KVCacheView | None:
        """
        Return the keys and values of ancestors that ran before, as far back as the layer looks.

        Raises `NotImplementedError` if a checkpointed layer attends several times: which time runs again is not known.
        """
        assert self.cache is not None
        if not len(self.cache.slots):
            return None
        slots = self._get_layer_slots(local_size)
        return KVCacheView(self.cache.get_kv_cache(layer, self._count_call(layer), slots.kept), slots)

    def _count_call(self, layer: torch.nn.Module) -> int:
        """Return how often a layer attended before in this forward."""
        if not is_in_backward():
            self._calls[layer] += 1
            return self._calls[layer] - 1
        if self._calls[layer] > 1:  # a checkpointed layer runs again
            raise NotImplementedError(
                "Waves (wave_tokens) do not combine with gradient checkpointing in this model: "
                f"{type(layer).__name__} attends several times in a forward. Set gradient_checkpointing=False, or "
                "leave out wave_tokens."
            )
        return 0

    def _get_layer_slots(self, local_size: int | None) -> LayerSlots:
        """Return the slots of layers that look so many tokens back, the same object each time."""
        assert self.cache is not None
        if local_size not in self._layer_slots:
            kept = self.cache.get_window_slots(local_size)
            self._layer_slots[local_size] = LayerSlots.from_row(self.handed_on, kept, stores=self.stores)
        return self._layer_slots[local_size]

    def get_boundary(self, mode: ReplayMode) -> RowBoundary | None:
        """Return what layers that run this way take from other waves and leave for them."""
        assert self.cache is not None
        if not len(self.cache.slots):
            return None
        positions = {slot + i: first + i for first, last, slot in self.handed_on for i in range(last - first)}
        return RowBoundary(
            self.plan.length,
            positions,
            self.cache.get_boundary_slots(mode),
            self.cache.inputs_and_states,
            self.stores,
        )


def select(x: torch.Tensor, tokens: Ranges) -> torch.Tensor:
    """Return the entries of some tokens, `(..., num_tokens)`, of a tensor of shape `(..., row_length)`."""
    parts = [x[..., start:end] for start, end in tokens]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
