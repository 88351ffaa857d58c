"""Float64 throughout: model code that asks for float32 by name gets float64 as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class ForcedFloat64(TorchFunctionMode):
    """
    Context manager that turns every request for float32 into float64.

    `model.double()` is not enough: in transformers, RMSNorm, rotary embeddings, softmax and routers ask for float32 by
    name and round to it. Inside this context they get float64. Autograd runs the backward pass outside the context, so
    a checkpointed function must enter the context itself to be recomputed in float64.

    Example:

    ```python
    model.double()
    with ForcedFloat64():
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
    ```
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(_widen, args), **{name: _widen(value) for name, value in (kwargs or {}).items()})


def _widen(value: object) -> object:
    return torch.float64 if value is torch.float32 else value
