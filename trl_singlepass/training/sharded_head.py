"""FSDP2 with TRL's fused head: the head must be gathered while it is used, or gradients stay on their rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from ..engine.enable import without_adapters


if TYPE_CHECKING:
    from peft import PeftModel


def gather_head_with_model(model: PreTrainedModel | PeftModel) -> None:
    """
    Gather a head that FSDP2 shards on its own whenever the model runs; with other engines, do nothing.

    FSDP2 gathers a module when it is called, but TRL's fused head reads the weight without calling the head, and the
    copy that TRL gathers instead only collects the gradient of the rank's own tokens. accelerate avoids this where it
    finds the last normalisation, which is called, and shards the head together with it; in models with encoders of
    other media it finds none.

    Takes the model as accelerate has prepared it.
    """
    head = without_adapters(model).get_output_embeddings()
    if not hasattr(head, "unshard"):
        return

    def gather(*_: object) -> None:
        head.unshard()

    def release(*_: object) -> None:
        if not torch.is_grad_enabled():  # otherwise, the backward pass releases it
            head.reshard()

    model.register_forward_pre_hook(gather)
    model.register_forward_hook(release)
