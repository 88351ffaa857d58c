"""Count kernel launches on any device, meta tensors included: operators that write memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


# They reserve or rename memory and start nothing.
_WITHOUT_KERNEL = frozenset(
    {
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "promote_types",
        "_unsafe_view",
    }
)  # fmt: skip
_ATTENTION = ("attention", "flash_attn", "flash_bwd", "flash_fwd")


class LaunchCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """
    Counts the operators that reach the device while it is entered, those of the backward pass included.

    Views, and operators that only reserve memory, are left out. Most others launch one kernel, some a few (a flash
    attention's backward about three), so that the count is a lower bound.

    ```python
    with LaunchCounter() as counter:
        step()
    counter.total, counter.attention_operators
    ```
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()
        self.dispatched = 0  # all operators, views and what reserves memory included

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Any:
        """Run an operator, and count it if it computes something."""
        result = func(*args, **(kwargs or {}))
        self.dispatched += 1
        schema = getattr(func, "_schema", None)
        name = func.name() if schema is None else schema.name
        returns = () if schema is None else schema.returns
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in returns)
        if not is_view and name.rpartition("::")[2] not in _WITHOUT_KERNEL:
            self.operators[name] += 1
        return result

    @property
    def total(self) -> int:
        """Number of operators counted."""
        return self.operators.total()

    @property
    def attention_operators(self) -> tuple[str, ...]:
        """Names of the attention kernels that ran; none where attention is made of matrix products."""
        return tuple(sorted(name for name in self.operators if any(part in name for part in _ATTENTION)))
