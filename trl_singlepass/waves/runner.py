"""The schedule: forward and backward over the waves of a row, in an order that never needs more than one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..attention.context import Tree, running_on
from .plan import Ranges, Wave, WavePlan
from .state import GroupMemory, WaveTree


class WaveRunner:
    """
    A row that runs wave by wave.

    A wave needs the keys and values of its ancestors, and the gradients of its own from its descendants. So the tokens
    that have descendants in later waves run forward first, in row order, keeping only keys and values; then each wave
    runs forward and backward, from the last to the first.

    Args:
        plan (`WavePlan`):
            The waves.
        tree (`Tree`):
            Tree of the whole row.
        offload (`bool`, *optional*, defaults to `False`):
            Whether keys, values and their gradients wait on the CPU.
    """

    def __init__(self, plan: WavePlan, tree: Tree, offload: bool = False) -> None:
        self.plan = plan
        self.tree = tree
        self.memories = [GroupMemory(plan.row, group, offload) for group in plan.groups]
        self.peak_memory_bytes = 0
        self._surveyed = False

    @property
    def last(self) -> Wave:
        """The wave whose backward comes last."""
        return self.plan.groups[-1][0]

    def survey(self, forward: Callable[[Wave, Ranges], Any]) -> Iterator[tuple[Wave, Any]]:
        """
        Run the whole row forward, wave by wave, keeping keys and values only.

        Args:
            forward (`Callable`):
                Runs the model on some tokens (row ranges) of a wave and returns its outputs.

        Yields:
            `tuple[Wave, Any]`: Each wave in row order, with its outputs.
        """
        for group, memory in zip(self.plan.groups, self.memories, strict=True):
            for wave in group:
                with _forward_only():
                    outputs = self._run(wave, ((wave.start, wave.end),), memory, forward, writes=True)
                yield wave, outputs
        self._surveyed = True

    def remember(self, remember: Callable[[Wave, Ranges], Any]) -> None:
        """
        Run what is handed on forward, for all groups before the first wave trains.

        Args:
            remember (`Callable`):
                Runs the model on some tokens (row ranges) of a wave.
        """
        waves = [
            (wave, memory)
            for group, memory in zip(self.plan.groups, self.memories, strict=True)
            for wave in group
            if wave.handed_on
        ]
        for wave, memory in waves:
            with _forward_only():
                self._run(wave, wave.handed_on, memory, remember, writes=True)
        self._surveyed = True

    def train(
        self, forward: Callable[[Wave, Ranges], Any], remember: Callable[[Wave, Ranges], Any]
    ) -> Iterator[tuple[Wave, Any]]:
        """
        Run the row forward and backward; the caller sends gradients back through a wave before it asks for the next.

        Args:
            forward (`Callable`):
                Runs the model on some tokens (row ranges) of a wave and returns its outputs.
            remember (`Callable`):
                The same where outputs are not needed, only what attention layers see.

        Yields:
            `tuple[Wave, Any]`: Each wave with its outputs, [`last`] last.
        """
        for index, group in enumerate(self.plan.groups):
            memory = self.memories[index]
            yield from self._train_group(group, memory, forward, remember)
            self.peak_memory_bytes = max(self.peak_memory_bytes, memory.num_bytes)
            if group[0] is not self.last:  # the last backward is still to come
                self.memories[index] = GroupMemory(self.plan.row, group)

    def _train_group(
        self, group: tuple[Wave, ...], memory: GroupMemory, forward: Callable[..., Any], remember: Callable[..., Any]
    ) -> Iterator[tuple[Wave, Any]]:
        kept = None
        assert not (group[0].is_kept and self._surveyed), "a history that is kept runs once"
        if group[0].is_kept:
            kept = self._run(group[0], ((group[0].start, group[0].end),), memory, forward, writes=True)
        for wave in group:
            if wave.handed_on and not wave.is_kept and not self._surveyed:
                with _forward_only():
                    self._run(wave, wave.handed_on, memory, remember, writes=True)
        for wave in reversed(group):
            if wave.is_kept:
                yield wave, kept
            else:
                yield wave, self._run(wave, ((wave.start, wave.end),), memory, forward, writes=False)

    def _run(
        self, wave: Wave, tokens: Ranges, memory: GroupMemory, forward: Callable[..., Any], *, writes: bool
    ) -> Any:
        with running_on(WaveTree.of(wave, tokens, memory, self.tree, writes=writes)):
            return forward(wave, tokens)


@contextmanager
def _forward_only() -> Iterator[None]:
    """No gradients; reentrant checkpointing warns that there are none, which is meant here."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        yield
