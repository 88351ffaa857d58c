"""Models under adapters."""

from __future__ import annotations

from typing import Any


def without_adapters(model: Any) -> Any:
    """
    Return the model that adapters were added to, which is the model itself where there are none.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`):
            Model.

    Returns:
        `transformers.PreTrainedModel`: Its base.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model
