"""
Speed-up that counted operations allow, where attention runs at another speed than matrix products.

Flash kernels compute scores again in backward: 5 matrix products there for 2 in forward, in the place of the 4 that
[`Cost`] counts. With `a` the attention's share of peak and `m` that of matrix products, a step takes

    (flops - attention) / m + 7/6 × attention / a

in units of the time that the GPU's peak would take. N-pass repeats histories, in which both grow; attention grows less
(its pairs are shared for two thirds of what tokens are, in the end), so that a slow kernel lowers the bound.

For example, with N-pass at 10 operations, 4 of them attention, and the single pass at 5, 3 of them attention, both at
`m = 0.8`: at `a = 0.8` they take 13.3 and 6.9 and the bound is 1.94, at `a = 0.4` it is 19.2 / 11.3 = 1.70.
"""

from __future__ import annotations

from dataclasses import dataclass

from trl_singlepass.cost import Cost, ModelShape


# Operations of a flash kernel, forward and backward, over those that `Cost` counts.
FLASH_RECOMPUTATION = 7 / 6


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """How fast a GPU runs a model's two kinds of work, as shares of its peak in half precision."""

    attention: float  # of an attention kernel, forward and backward
    matrices: float  # of matrix products

    def peak_flops(self, cost: Cost, shape: ModelShape) -> float:
        """Return how many operations the GPU could do at its peak in the time that a step takes."""
        attention = attention_flops(cost, shape)
        return (cost.flops - attention) / self.matrices + FLASH_RECOMPUTATION * attention / self.attention

    def bound(self, npass: Cost, single_pass: Cost, shape: ModelShape) -> float:
        """Return the speed-up of the single pass where neither way loses time to anything but its operations."""
        return self.peak_flops(npass, shape) / self.peak_flops(single_pass, shape)


def attention_flops(cost: Cost, shape: ModelShape) -> int:
    """Return the operations of a cost that are attention: scores and weighted sums of values."""
    return 3 * 4 * shape.attention_width * cost.attention_pairs
