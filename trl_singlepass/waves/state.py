"""A wave as the tree that layers receive, and what its layers remember for later waves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..attention.context import Tree
from ..attention.kv_cache import KVCache, KVCacheView, SlotRanges
from ..recurrent.boundary import Handover, Kept
from ..recurrent.boundary_grads import Leaves
from ..recurrent.layer_kinds import ReplayMode
from ..trees.rows import TreePlan
from .plan import Ranges, Wave
from .subplan import Placement, pass_plan


class GroupMemory:
    """
    Keys and values that the waves of a group hand on, by layer, with the gradients that come back.

    Args:
        row (`TreePlan`):
            Structure of the row.
        waves (`Sequence[Wave]`):
            Waves of the group, in row order.
        offload (`bool`, *optional*, defaults to `False`):
            Whether to hold keys, values and their gradients on the CPU.
    """

    def __init__(self, row: TreePlan, waves: Sequence[Wave], offload: bool = False) -> None:
        self.row = row
        self.slots = Placement.one_after_the_other(tokens for wave in waves for tokens in wave.handed_on)
        self.offload = offload
        self.layers: dict[torch.nn.Module, KVCache] = {}
        self.leaves: defaultdict[torch.nn.Module, Leaves] = defaultdict(lambda: Leaves(offload))
        self._waves = waves
        self._kept: dict[ReplayMode, Kept] = {}

    def of(self, layer: torch.nn.Module, num_slots: int) -> KVCache:
        """Return the memory of a layer."""
        if layer not in self.layers:
            self.layers[layer] = KVCache(num_slots, self.offload)
        return self.layers[layer]

    def kept_within(self, local_size: int | None) -> NDArray[np.int64]:
        """Return the slots of the tokens to which layers look back that see so many tokens."""
        if local_size is None:
            return np.arange(len(self.slots))
        return self.kept(ReplayMode(starts_from_state=False, reach=local_size - 1)).inputs

    def kept(self, mode: ReplayMode) -> Kept:
        """Return what the waves need of one another where recurrent layers run one way."""
        if mode not in self._kept:
            whole = (Placement.one_after_the_other(((wave.start, wave.end),)) for wave in self._waves)
            plans = (pass_plan(self.row, tokens, self.slots) for tokens in whole)
            self._kept[mode] = Kept.by(plans, mode.schedule)
        return self._kept[mode]

    def handed_on(self, tokens: Placement, wave: Wave) -> SlotRanges:
        """
        Return the slots of the tokens that a wave hands on.

        Args:
            tokens (`Placement`):
                Tokens that run.
            wave (`Wave`):
                Their wave.
        """
        return tuple(
            (*own, slot[0])
            for first, last in wave.handed_on
            for own, slot in zip(tokens.of(first, last), self.slots.of(first, last), strict=True)
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values, inputs, states and gradients."""
        held = (
            x for layer in self.layers.values() for x in (layer.key, layer.value, layer.grad_key, layer.grad_value)
        )
        keys_and_values = sum(x.numel() * x.element_size() for x in held if x is not None)
        return keys_and_values + sum(leaves.num_bytes for leaves in self.leaves.values())


@dataclass(eq=False)
class WaveTree(Tree):
    """
    Tree of a forward over some tokens of a row, whose other ancestors lie in memory.

    Positions of its plan from `plan.length` on are slots of the memory (see [`pass_plan`]).

    Args:
        plan (`TreePlan`):
            Structure of the tokens that run.
        subtree_end (`torch.Tensor` of shape `(1, num_tokens)`, `torch.int64`):
            For each token, the position just past its last descendant that runs along.
        depth (`torch.Tensor` of shape `(1, num_tokens)`, `torch.int64`):
            Number of tokens before each token on its path.
        attended_by (`set[torch.nn.Module]`):
            Layers that received it.
        memory (`GroupMemory`):
            Keys and values of the ancestors that do not run along.
        handed_on (`SlotRanges`):
            Tokens that later waves attend to.
        writes (`bool`):
            Whether these tokens run for the first time.
    """

    memory: GroupMemory | None = None
    handed_on: SlotRanges = ()
    writes: bool = False

    @classmethod
    def of(
        cls,
        wave: Wave,
        tokens: Ranges,
        memory: GroupMemory,
        row: Tree,
        *,
        writes: bool,
    ) -> WaveTree:
        """
        Return the tree of a forward.

        Args:
            wave (`Wave`):
                Wave that runs.
            tokens (`Ranges`):
                Its tokens that run: all of them, or those that it hands on.
            memory (`GroupMemory`):
                Memory of its group.
            row (`Tree`):
                Tree of the whole row.
            writes (`bool`):
                Whether these tokens run for the first time.
        """
        placement = Placement.one_after_the_other(tokens)
        plan = pass_plan(memory.row, placement, memory.slots)
        end = (select(row.subtree_end, tokens) - tokens[0][0]).clamp(max=plan.length)
        if len(tokens) > 1:  # a path: what comes later descends from what comes earlier
            end = torch.full_like(end, plan.length)
        handed_on = memory.handed_on(placement, wave)
        return cls(plan, end, select(row.depth, tokens), row.attended_by, memory, handed_on, writes)

    def kv_cache(self, layer: torch.nn.Module, local_size: int | None = None) -> KVCacheView | None:
        """Return keys and values of ancestors that ran before, as far as the layer looks back."""
        assert self.memory is not None
        if not len(self.memory.slots):
            return None
        kept = self.memory.kept_within(local_size)
        return KVCacheView.for_layer(self.memory.of(layer, len(kept)), self.handed_on, kept, stores=self.writes)

    def handover(self, mode: ReplayMode) -> Handover | None:
        """Return what recurrent layers need of ancestors that ran before."""
        assert self.memory is not None
        if not len(self.memory.slots):
            return None
        own = {slot + i: first + i for first, last, slot in self.handed_on for i in range(last - first)}
        return Handover(self.plan.length, own, self.memory.kept(mode), self.memory.leaves, self.writes)


def select(x: torch.Tensor, tokens: Ranges) -> torch.Tensor:
    """
    Return some tokens of a row.

    Args:
        x (`torch.Tensor` of shape `(1, row_length, ...)`):
            Something per token.
        tokens (`Ranges`):
            Half-open ranges of row positions.
    """
    parts = [x[:, start:end] for start, end in tokens]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
