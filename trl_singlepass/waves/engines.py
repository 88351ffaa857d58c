"""Gradients of all waves but the last stay on the rank; the last backward synchronises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


class Engine:
    """
    How waves call the model, and how the first of them send their gradients back: one process.

    Args:
        model (`torch.nn.Module`):
            Model as the Trainer wrapped it.
        backward (`Callable`):
            Sends gradients back from a loss, scaled as the Trainer scales its own.
    """

    def __init__(self, model: Any, backward: Callable[[torch.Tensor], None]) -> None:
        self.model = model
        self.backward = backward

    def inner(self, **inputs: Any) -> Any:
        """Run the model for a wave whose gradients stay on the rank."""
        return self.model(**inputs)

    def last(self, *, is_kept: bool, **inputs: Any) -> Any:
        """
        Run the model for the wave whose backward comes last.

        Args:
            is_kept (`bool`):
                Whether backwards of other waves come before its own.
            **inputs (`Any`):
                Inputs of the model.
        """
        return self.model(**inputs)

    def synchronise(self, outputs: torch.Tensor) -> None:
        """Make the next backward, from these outputs of a wave that was kept, reduce gradients over all ranks."""


class DataParallelEngine(Engine):
    """
    `DistributedDataParallel`, whose forward runs once per batch on every rank, however many waves a rank has.

    Its collectives (buffers, buckets) then pair up. Inner waves run on the module inside, whose gradients add up as
    under `no_sync`.
    """

    def inner(self, **inputs: Any) -> Any:
        """Run the module inside."""
        return self.model.module(**inputs)

    def last(self, *, is_kept: bool, **inputs: Any) -> Any:
        """Run the wrapper; without preparing it for backward where other backwards come first."""
        if not is_kept:
            return self.model(**inputs)
        with self.model.no_sync():
            return self.model(**inputs)

    def synchronise(self, outputs: torch.Tensor) -> None:
        """Prepare the wrapper for backward, as its own forward and `Accelerator.trigger_sync_in_backward` do."""
        if self.model.require_backward_grad_sync:
            self.model.require_forward_param_sync = True
            self.model.reducer.prepare_for_backward([outputs] if self.model.find_unused_parameters else [])


def engine_of(model: Any, backward: Callable[[torch.Tensor], None]) -> Engine:
    """
    Return how waves call a model.

    Args:
        model (`torch.nn.Module`):
            Model as the Trainer wrapped it.
        backward (`Callable`):
            Sends gradients back from a loss, scaled as the Trainer scales its own.
    """
    return (DataParallelEngine if isinstance(model, DistributedDataParallel) else Engine)(model, backward)
