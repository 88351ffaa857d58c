"""What a run has trained so far, for the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class RowCounts:
    """Running counts of the rows of one process: nothing is read from the device until the log asks."""

    def __init__(self) -> None:
        self._trained: torch.Tensor | float = 0.0
        self._sample_tokens = 0
        self._row_tokens = 0

    def add(self, batches: Sequence[dict[str, Any]], num_items: torch.Tensor) -> None:
        """
        Count the batches of one step.

        Args:
            batches (`Sequence[dict[str, Any]]`):
                Batches of the collator.
            num_items (`torch.Tensor`):
                Sum of their loss weights, over all ranks, a scalar.
        """
        exact = torch.float32 if num_items.device.type == "mps" else torch.float64
        self._trained = self._trained + num_items.to(exact)
        for plan in (batch["tree_plan"] for batch in batches if "tree_plan" in batch):
            self._sample_tokens += plan.num_sample_tokens
            self._row_tokens += plan.example_ends[-1]

    def pop_logs(self) -> dict[str, float]:
        """Return the sharing factor since the last call and the tokens trained since the start of the run."""
        if self._row_tokens == 0:
            return {}
        logs = {
            "sharing_factor": self._sample_tokens / self._row_tokens,
            "num_trained_tokens": round(float(self._trained), 3),  # weights add up in float32
        }
        self._sample_tokens = self._row_tokens = 0
        return logs
