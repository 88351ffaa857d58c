"""Gradients of all waves but the last stay on the rank; the last backward synchronises."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel


SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP)
"""Engines whose ranks meet inside of the model: they need the same calls on every rank, and in the same order."""


class Engine:
    """
    How waves call the model, and how the first of them send their gradients back: one process.

    Args:
        model (`torch.nn.Module`):
            Model as the Trainer wrapped it.
        accelerator (`accelerate.Accelerator`):
            Accelerator of the Trainer.
        scale (`float`):
            What the Trainer multiplies its loss with.
    """

    def __init__(self, model: Any, accelerator: Any, scale: float) -> None:
        self.model, self.accelerator, self.scale = model, accelerator, scale

    def backward(self, loss: torch.Tensor) -> None:
        """Send gradients back from the loss of a wave that is not the last: the optimizer does not step after it."""
        state = self.accelerator.gradient_state
        steps = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            # As the Trainer does: DeepSpeed must not divide by the accumulation steps once more.
            on_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
            self.accelerator.backward(loss * self.scale, **({"scale_wrt_gas": False} if on_deepspeed else {}))
        finally:
            state._set_sync_gradients(steps)

    def padding(self, num_forwards: int, num_waves: int) -> tuple[int, int]:
        """
        Return how many forwards without and with a backward this rank has to add so that all ranks have as many.

        Args:
            num_forwards (`int`):
                Forwards without a backward of this rank.
            num_waves (`int`):
                Forwards with a backward of this rank.
        """
        return 0, 0

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


class ShardedEngine(Engine):
    """
    DeepSpeed and FSDP2: every wave is to the engine one more batch of gradient accumulation.

    Gradients are reduced wave by wave, so that no rank holds those of all parameters.
    """

    def padding(self, num_forwards: int, num_waves: int) -> tuple[int, int]:
        """Ask all ranks."""
        own = torch.tensor([[num_forwards, num_waves]], device=self.accelerator.device)
        most = self.accelerator.gather(own).amax(0).tolist()
        return most[0] - num_forwards, most[1] - num_waves


def get_engine(model: Any, accelerator: Any, scale: float) -> Engine:
    """
    Return how waves call a model.

    Args:
        model (`torch.nn.Module`):
            Model as the Trainer wrapped it.
        accelerator (`accelerate.Accelerator`):
            Accelerator of the Trainer.
        scale (`float`):
            What the Trainer multiplies its loss with.
    """
    if accelerator.distributed_type in SHARDED:
        return ShardedEngine(model, accelerator, scale)
    return (DataParallelEngine if isinstance(model, DistributedDataParallel) else Engine)(model, accelerator, scale)
