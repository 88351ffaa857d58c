"""How pieces of a batch call a wrapped model: the engine reduces the gradients of all of them once, after the last."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

from ..attention.row_group import RowGroup
from ..trees.prefix_tree import IGNORE_INDEX
from .model_call import PER_TOKEN_OUTPUTS


SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP)
"""Engines whose ranks meet inside the model: every rank has to make the same calls in the same order."""


class WrappedModel:
    """One process: pieces call the model, as the Trainer wrapped it; `scale` is what it multiplies its loss by."""

    is_sharded = False

    def __init__(self, model: torch.nn.Module, accelerator: Accelerator, scale: float) -> None:
        self.model, self.accelerator, self.scale = model, accelerator, scale

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward of a piece that is not the last: the optimizer does not step after it."""
        state = self.accelerator.gradient_state
        steps = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            # As the Trainer does: DeepSpeed must not divide by the accumulation steps once more.
            on_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
            self.accelerator.backward(loss * self.scale, **({"scale_wrt_gas": False} if on_deepspeed else {}))
        finally:
            state._set_sync_gradients(steps)

    def largest(self, *counts: int) -> list[int]:
        """Return the largest of some counts over all ranks, each of which must call."""
        if self.accelerator.num_processes == 1:
            return list(counts)
        own = torch.tensor([counts], device=self.accelerator.device)
        largest: list[int] = self.accelerator.gather(own).amax(0).tolist()
        return largest

    def forward(self, **inputs: Any) -> Any:
        """Run the model for a piece whose gradients stay on the rank."""
        return self.model(**inputs)

    def forward_last(self, *, is_kept: bool, **inputs: Any) -> Any:
        """Run the model for the piece whose backward comes last; it `is_kept` if those of others come in between."""
        return self.forward(**inputs)

    def reduce_in_next_backward(self, outputs: torch.Tensor) -> None:
        """Make the next backward, from these outputs of a kept piece, reduce gradients over all ranks."""


class DataParallelModel(WrappedModel):
    """
    `DistributedDataParallel`: its forward runs once per batch on every rank, so that its collectives pair up.

    Other pieces run on the module inside, whose gradients add up as under `no_sync`.
    """

    model: DistributedDataParallel

    def forward(self, **inputs: Any) -> Any:
        """Run the module inside."""
        return self.model.module(**inputs)

    def forward_last(self, *, is_kept: bool, **inputs: Any) -> Any:
        """Run the wrapper, which prepares for backward unless other backwards come first."""
        if not is_kept:
            return self.model(**inputs)
        with self.model.no_sync():
            return self.model(**inputs)

    def reduce_in_next_backward(self, outputs: torch.Tensor) -> None:
        """Prepare the wrapper for backward as its own forward and `Accelerator.trigger_sync_in_backward` do."""
        if self.model.require_backward_grad_sync:
            self.model.require_forward_param_sync = True
            self.model.reducer.prepare_for_backward([outputs] if self.model.find_unused_parameters else [])


class ShardedModel(WrappedModel):
    """DeepSpeed and FSDP2: every piece is one more batch of gradient accumulation, whose gradients are reduced."""

    is_sharded = True


class SharedRowModel(ShardedModel):
    """DeepSpeed with rows that ranks share: each runs the model on its part, and gets the outputs for all tokens."""

    def __init__(self, model: torch.nn.Module, accelerator: Accelerator, scale: float, group: RowGroup) -> None:
        super().__init__(model, accelerator, scale)
        self.group = group

    def forward(self, **inputs: Any) -> Any:
        """Run this rank's part; the outputs of TRL's fused head are those of all parts, others those of its own."""
        length = inputs["input_ids"].shape[1]
        parts = {
            name: self.group.pad_and_part(value, IGNORE_INDEX if name == "shift_labels" else 0)
            if isinstance(value, torch.Tensor) and value.shape == (1, length)
            else value
            for name, value in inputs.items()
        }
        outputs = self.model(**parts)
        if not inputs.get("fused_lm_head"):
            return outputs
        values = {name: outputs[name] for name in PER_TOKEN_OUTPUTS if outputs.get(name) is not None}
        own = torch.stack([value.to(outputs.log_probs.dtype) for value in values.values()], dim=-1)
        row = self.group.gather(own)[:, :length]
        for (name, value), whole in zip(values.items(), row.unbind(-1), strict=True):
            outputs[name] = whole.to(value.dtype)
        return outputs


def wrapped_model(
    model: torch.nn.Module, accelerator: Accelerator, scale: float, group: RowGroup | None = None
) -> WrappedModel:
    """Return how to call a model; its class and the accelerator decide, and whether ranks share the rows."""
    if group is not None:
        return SharedRowModel(model, accelerator, scale, group)
    if accelerator.distributed_type in SHARDED:
        return ShardedModel(model, accelerator, scale)
    kind = DataParallelModel if isinstance(model, DistributedDataParallel) else WrappedModel
    return kind(model, accelerator, scale)
