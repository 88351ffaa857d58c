"""Waves: run a row part by part, with the loss and gradients of the whole row and the memory of one part."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..attention.context import Tree, running_on
from ..attention.kv_cache import KVCache, KVCacheView, LayerSlots, SlotRanges, is_in_backward
from ..attention.offload import HostCopies
from ..recurrent.schedule import ReplayMode, last_tokens
from ..recurrent.states import BoundarySlots, BoundaryTensors, RowBoundary
from ..trees.rows import Ranges, Run, TreePlan
from .wave_plan import RangeMap, Wave, WavePlan, make_subplan


Output = TypeVar("Output")
Forward = Callable[[Wave, Ranges], Output]
"""Runs the model on some tokens of a wave, given as row ranges, and returns its outputs."""


class WaveRunner:
    """
    Runs a row wave by wave.

    A wave needs the keys and values of its ancestors, and for these the gradients of their descendants. So tokens with
    descendants in later waves run forward first, in row order, and only keys, values and what else layers need of them
    are stored. Then each wave runs forward and backward, from the last to the first.
    """

    def __init__(self, plan: WavePlan, tree: Tree, offload: bool = False) -> None:
        self.plan = plan
        self.tree = tree
        self.caches = [GroupCache(plan.row, group, offload) for group in plan.groups]
        self.peak_cache_bytes = 0
        self._history_is_stored = False

    @property
    def last(self) -> Wave:
        """The wave whose backward comes last."""
        return self.plan.groups[-1][0]

    def first_tokens(self) -> tuple[Ranges, Tree]:
        """Return the first two tokens (of each rank), and their tree: a model takes one for a step of generation."""
        group = self.tree.group
        num_tokens = min(2, self.plan.row.length) if group is None else group.padded_length(1)
        depth = torch.arange(num_tokens, device=self.tree.depth.device)[None]
        plan = TreePlan(num_tokens, (Run(0, num_tokens, 0, ()),))
        return ((0, num_tokens),), Tree(plan, torch.full_like(depth, num_tokens), depth, group=group)

    def forward_all(self, forward: Forward[Output]) -> Iterator[tuple[Wave, Output]]:
        """Run the row forward without gradients, and store what later waves need; yield waves with their outputs."""
        for group, cache in zip(self.plan.groups, self.caches, strict=True):
            for wave in group:
                with _forward_only():
                    outputs = self._run(wave, ((wave.start, wave.end),), cache, forward, stores=True)
                yield wave, outputs
        self._history_is_stored = True

    def store_history(self, forward: Forward[object]) -> None:
        """Run the tokens that later waves descend from, for all groups before the first wave trains."""
        for group, cache in zip(self.plan.groups, self.caches, strict=True):
            self._store_group(group, cache, forward)
        self._history_is_stored = True

    def train(self, forward: Forward[Output], forward_history: Forward[object]) -> Iterator[tuple[Wave, Output]]:
        """Run the row forward and backward; yield each wave, [`last`] last, whose backward runs before the next."""
        for index, group in enumerate(self.plan.groups):
            cache = self.caches[index]
            yield from self._train_group(group, cache, forward, forward_history)
            self.peak_cache_bytes = max(self.peak_cache_bytes, cache.num_bytes)
            if group[0] is not self.last:  # the last backward is still to come
                self.caches[index] = GroupCache(self.plan.row, group)

    def _train_group(
        self, group: tuple[Wave, ...], cache: GroupCache, forward: Forward[Output], forward_history: Forward[object]
    ) -> Iterator[tuple[Wave, Output]]:
        assert not (group[0].is_kept and self._history_is_stored), "a history that is kept runs once"
        first = group[0]
        kept = [self._run(first, ((first.start, first.end),), cache, forward, stores=True)] if first.is_kept else []
        if not self._history_is_stored:
            self._store_group(group, cache, forward_history)
        for wave in reversed(group):
            if wave.is_kept:
                yield wave, kept.pop()
            else:
                yield wave, self._run(wave, ((wave.start, wave.end),), cache, forward, stores=False)

    def _store_group(self, group: tuple[Wave, ...], cache: GroupCache, forward: Forward[object]) -> None:
        for wave in group:
            if wave.handed_on and not wave.is_kept:
                with _forward_only():
                    self._run(wave, wave.handed_on, cache, forward, stores=True)

    def _run(self, wave: Wave, tokens: Ranges, cache: GroupCache, forward: Forward[Output], *, stores: bool) -> Output:
        is_whole_row = len(wave) == self.plan.row.length
        tree = self.tree if is_whole_row else WaveTree.from_wave(wave, tokens, cache, self.tree, stores=stores)
        with running_on(tree):
            return forward(wave, tokens)


@contextmanager
def _forward_only() -> Iterator[None]:
    """Run without gradients. Reentrant checkpointing warns that there are none, which is intended here."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        yield


# A wave as the tree that layers receive, and what they store for later waves ----------------------------------------


class GroupCache:
    """
    What the waves of a group store for one another, by layer, with the gradients that come back.

    Every token with descendants in later waves has a slot: slots count these tokens in row order. Of the slots, each
    layer stores what it needs; with `offload`, on the CPU.
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
        """Return what one call of an attention layer stores in slots; DiffLlama's layers attend twice in a forward."""
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

        In the example of `wave_plan.py` with `wave_tokens=5`, branches start after tokens 3 and 1. A layer that sees
        only a token and the one before it needs slots 1 and 3 of the four.
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
            self._boundary_slots[mode] = BoundarySlots.from_plans(self._plans, mode)
        return self._boundary_slots[mode]

    def get_handed_on(self, tokens: RangeMap, wave: Wave) -> SlotRanges:
        """Return the slots of the tokens that a wave hands on, and where they are among the tokens that run."""
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
    Tree of a forward over some tokens of a row, whose other ancestors are in slots of a cache (see [`make_subplan`]).

    Its tensors, `(1, num_tokens)`, have an entry for each token that runs, with its depth in the row; for
    `subtree_end`, only descendants that run as well count. If ranks share the row, one more chain pads the tokens.
    """

    _: KW_ONLY
    cache: GroupCache  # what the layers have stored of ancestors that do not run
    row: Tree  # the tree of the whole row
    running: RangeMap  # the tokens that run
    handed_on: SlotRanges = ()  # tokens that later waves descend from
    stores: bool = False  # whether these tokens run for the first time
    _layer_slots: dict[int | None, LayerSlots] = field(default_factory=dict, init=False, repr=False)
    _calls: Counter[torch.nn.Module] = field(default_factory=Counter, init=False, repr=False)

    @classmethod
    def from_wave(cls, wave: Wave, tokens: Ranges, cache: GroupCache, row: Tree, *, stores: bool) -> WaveTree:
        """Return the tree of a forward over some tokens of a wave of `row`: all of them, or those that it hands on."""
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
        own = cache.get_handed_on(running, wave)
        return cls(plan, end, depth, row.group, cache=cache, row=row, running=running, handed_on=own, stores=stores)

    @cached_property
    def image_plan(self) -> TreePlan:
        """The plan whose images are runs of their own: part of that of the row, which is checked as a whole."""
        return make_subplan(self.row.image_plan, self.running, self.cache.slots, self.plan.length)

    def sample_lengths(self, limits: Iterable[int]) -> torch.Tensor:
        """Return the lengths that the tokens have in the row."""
        of_row = self.row.make_once("sample_lengths", lambda: self.row.sample_lengths(limits))
        lengths = select(of_row, self.running.ranges)
        return F.pad(lengths, (0, self.plan.length - lengths.shape[1]))

    def kv_cache(self, layer: torch.nn.Module, local_size: int | None = None) -> KVCacheView | None:
        """Return the keys and values of ancestors that ran before, as far back as the layer looks."""
        if not len(self.cache.slots):
            return None
        if local_size not in self._layer_slots:  # the same object for all layers that look so many tokens back
            kept = self.cache.get_window_slots(local_size)
            self._layer_slots[local_size] = LayerSlots.from_row(self.handed_on, kept, stores=self.stores)
        slots = self._layer_slots[local_size]
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

    def get_boundary(self, mode: ReplayMode) -> RowBoundary | None:
        """Return what layers that run this way take from other waves and leave for them."""
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
