"""FSDP2 and TRL's fused head: its weight has to be whole while it is used, or ranks keep gradients to themselves."""

from __future__ import annotations

from typing import Any

import torch

from .model import without_adapters


def gather_head_with_model(model: Any) -> None:
    """
    Make a head that FSDP2 shards on its own whole whenever the model runs.

    TRL's fused head reads the weight and never calls the head, which is when FSDP2 would gather it. What TRL gathers
    in its place has the gradient of the rank's own tokens. accelerate shards the head together with the last
    normalisation, which is called, where it finds one; in models with encoders of other media it finds none.

    Args:
        model (`transformers.PreTrainedModel`, `peft.PeftModel`):
            Model that the engine has taken over; on other engines, nothing happens.
    """
    head = without_adapters(model).get_output_embeddings()
    if not hasattr(head, "unshard"):
        return

    def gather(*_: Any) -> None:
        head.unshard()

    def release(*_: Any) -> None:
        if not torch.is_grad_enabled():  # otherwise, backward releases it
            head.reshard()

    model.register_forward_pre_hook(gather)
    model.register_forward_hook(release)
