"""Factors of the log-probabilities of turns, where the literature weighs the turns of a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class TurnWeights:
    """
    Factors of the log-probabilities of turns.

    With the discount factor γ of DMPO, turn `t` of `T`, counted from 0, has the factor `(1 - γ^(T - t)) / (1 - γ^T)`.
    The first turn always has the factor 1, and later ones less; near 0, all have 1. With `γ = 0.5`, two turns have
    `(1, 2/3)`.

    With `is_mean`, a turn counts with the mean of its tokens instead of their sum, so that long turns weigh no more
    than short ones.

    Source: DMPO, arXiv 2406.14868 (equation of φ(t, T)).
    """

    discount: float | None = None  # γ, between 0 and 1; no discount if `None`
    is_mean: bool = False

    def __post_init__(self) -> None:
        if self.discount is not None and not 0 < self.discount < 1:
            raise ValueError(f"turn_discount={self.discount}: expected a number between 0 and 1, without either.")

    @property
    def are_all_one(self) -> bool:
        """Whether every token has the factor 1."""
        return self.discount is None and not self.is_mean

    def of_tokens(self, turn_lengths: ArrayLike | Sequence[int]) -> NDArray[np.float64]:
        """
        Return the factor of each token of a trajectory, of shape `(num_tokens,)`, given the number of tokens of each
        turn.
        """
        lengths = np.asarray(turn_lengths, np.int64)
        factors: NDArray[np.float64] = np.ones(len(lengths))
        if self.discount is not None:
            left = np.arange(len(lengths), 0, -1)  # T - t
            factors *= (1 - self.discount**left) / (1 - self.discount ** len(lengths))
        if self.is_mean:
            factors = factors / np.maximum(lengths, 1)
        return np.repeat(factors, lengths)
