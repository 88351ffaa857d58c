"""Ratios estimated from a random sample of conversations, with their confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


Z_95 = 1.96


@dataclass(frozen=True, slots=True)
class Estimate:
    """
    An estimate with its 95 % confidence interval.

    Args:
        value (`float`):
            The estimate.
        low (`float`, *optional*):
            Lower end of the interval; the value itself if every conversation was audited, `None` if only one of many
            was.
        high (`float`, *optional*):
            Upper end of the interval.
    """

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.2f} ± ?"
        half = (self.high - self.low) / 2
        if half == 0:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ± {half:.2f}" if half >= 0.005 else f"{self.value:.2f} ± <0.01"


def estimate_ratio(numerators: Sequence[float], denominators: Sequence[float], coverage: float) -> Estimate:
    """
    Estimate the ratio of two totals of a dataset.

    Args:
        numerators (`Sequence[float]`):
            Numerator of each conversation in the sample.
        denominators (`Sequence[float]`):
            Denominator of each conversation, with a sum above 0.
        coverage (`float`):
            Fraction of the dataset that was sampled: 1 for all of it, 0 if its size is unknown.

    Returns:
        `Estimate`: The ratio of the sample's totals, with the interval of the linearised ratio estimator under the
        finite-population correction.

    Source: Cochran, *Sampling Techniques* (1977), formula 6.13.
    """
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    value, size = float(top.sum() / bottom.sum()), len(top)
    if coverage == 1:
        return Estimate(value, value, value)
    if size < 2:
        return Estimate(value, None, None)
    residuals = top - value * bottom
    half = Z_95 * float(np.sqrt((1 - coverage) * size / (size - 1) * (residuals**2).sum())) / float(bottom.sum())
    return Estimate(value, value - half, value + half)
