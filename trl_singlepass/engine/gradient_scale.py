"""Gradients under sequence parallelism: DeepSpeed scales them, which is corrected, and measured in the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def get_gradient_scale(engine: DeepSpeedEngine, sp_size: int) -> int:
    """
    Return how many times too large DeepSpeed makes gradients under sequence parallelism.

    It divides their sum by the number of ranks with ZeRO-3's reduce-scatter, but by the number of groups elsewhere
    (DeepSpeed issue 5248). Adam hides the difference; gradient clipping, SGD and the logged norm do not. `sp_size` is
    the number of ranks in a group.
    """
    scatters = engine.zero_optimization_stage() == 3 and engine.zero_reduce_scatter()
    return 1 if scatters else sp_size


class GradientCheck:
    """
    Compares the gradient of one parameter after DeepSpeed's reduction with the mean over ranks, before the first step.
    `scale` is how many times too large the gradients of the engine are expected to be.
    """

    def __init__(self, engine: DeepSpeedEngine, scale: int) -> None:
        self.engine, self.scale = engine, scale
        trainable = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        # The last one: the first factor of an adapter has no gradient yet.
        self.parameter = trainable[-1]
        self.local: torch.Tensor | None = None
        self._hook = self.parameter.register_hook(self._add)
        self._step = engine.step
        engine.step = self._checked_step

    def _add(self, gradient: torch.Tensor) -> None:
        gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        self.local = gradient.clone() if self.local is None else self.local + gradient

    def _checked_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._compare():
            self._hook.remove()
            self.engine.step = self._step
        return self._step(*args, **kwargs)

    def _compare(self) -> bool:
        """Return whether there was a gradient to compare; raise if its scale is not the expected one."""
        from deepspeed.utils import safe_get_full_grad

        reduced = safe_get_full_grad(self.parameter)
        if self.local is None or reduced is None:
            return False
        expected, self.local = self.local, None
        torch.distributed.all_reduce(expected)
        expected = expected * (self.scale / torch.distributed.get_world_size())
        norm = float(expected.norm())
        if norm == 0:
            return False
        ratio = float((reduced.to(expected.dtype).flatten() @ expected.flatten()) / norm**2)
        if abs(ratio - 1) > 0.1:
            raise RuntimeError(
                f"DeepSpeed returned gradients {ratio:.3g} times as large as their mean over ranks under sequence "
                "parallelism: clipping, SGD and the logged norm would be wrong by that factor. Use ZeRO-3 with its "
                "default reduce_scatter, without fp16."
            )
        return True
