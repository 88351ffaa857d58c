"""Where tests marked `gpu` run: on a GPU, or with `TEST_DEVICE=cpu` on the CPU, to try the tests themselves out."""

import os

import pytest
import torch


DEVICE = os.environ.get("TEST_DEVICE", "cuda")
needs_device = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(),
    reason="needs a GPU; TEST_DEVICE=cpu tries the tests themselves out",
)


def on_device(record, device=DEVICE):
    """Return a `Tree` or `AttentionInputs` with its tensors on the device, as leaves."""
    fields = {name: getattr(record, name) for name, field in record.__dataclass_fields__.items() if field.init}
    return type(record)(
        **{
            name: value.detach().to(device).requires_grad_(value.requires_grad) if torch.is_tensor(value) else value
            for name, value in fields.items()
        }
    )
