"""Run the waves of a row forward and backward, so that besides a kept history only one has activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from ...attention.context import Tree, running_on
from ...trees.rows import Ranges, Run, TreePlan
from .plan import Wave, WavePlan
from .tree import GroupCache, WaveTree


Output = TypeVar("Output")
Forward = Callable[[Wave, Ranges], Output]
"""Runs the model on some tokens of a wave, given as row ranges, and returns its outputs."""


class WaveRunner:
    """
    Runs a row wave by wave.

    A wave needs the keys and values of its ancestors, and for these the gradients of their descendants. So tokens with
    descendants in later waves run forward first, in row order, and only keys, values and what else layers need of them
    are stored. Then each wave runs forward and backward, from the last to the first.

    `tree` is that of the whole row. With `offload`, what is stored, and its gradients, wait on the CPU.
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
        """
        Return the first two tokens, and their tree: models take a single one for a generation step.

        Ranks that share the row get two tokens each.
        """
        group = self.tree.group
        num_tokens = min(2, self.plan.row.length) if group is None else group.padded_length(1)
        depth = torch.arange(num_tokens, device=self.tree.depth.device)[None]
        plan = TreePlan(num_tokens, (Run(0, num_tokens, 0, ()),))
        return ((0, num_tokens),), Tree(plan, torch.full_like(depth, num_tokens), depth, group=group)

    def forward_all(self, forward: Forward[Output]) -> Iterator[tuple[Wave, Output]]:
        """
        Run the whole row forward, without gradients, and store what later waves need.

        Yields each wave in row order, with its outputs.
        """
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
        """
        Run the row forward and backward; yield each wave with its outputs, [`last`] last.

        The caller runs the backward of a wave before it asks for the next one. `forward_history` runs the model where
        only the layers matter, not the outputs.
        """
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
