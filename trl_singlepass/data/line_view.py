"""Rows whose outputs are read in lines, one per trajectory: the entry `tree` of a batch of preference pairs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from .collator import Batch


class LineView:
    """
    Rows of a batch, and where in them each token of each line is predicted.

    TRL's losses of trajectories read one padded line for each. The model runs on the rows, in which lines share what
    they have in common, and its outputs are laid out as TRL expects them. Not a dataclass, for the reason that
    [`RowTree`] is none.

    Shape letters: N lines, M tokens of the longest line.

    `rows` are batches of [`DataCollatorForSinglePass`], one per row. `targets`, `(N, M)`, int64, is the position among
    the tokens of all rows that predicts each token, 0 where there is none; `token_weights`, `(N, M)`, float32, is the
    factor of each log-probability.
    """

    def __init__(
        self, rows: Sequence[Batch], targets: torch.Tensor, token_weights: torch.Tensor | None = None
    ) -> None:
        self.rows, self.targets, self.token_weights = list(rows), targets, token_weights
        self.is_handled = False

    def handled(self) -> LineView:
        """Return the view for a caller who runs its rows as the trainer's settings say (see [`RowTree.handled`])."""
        return self._replace(is_handled=True)

    def _replace(self, **changes: Any) -> LineView:
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> LineView:
        """Return the view with all its tensors on a device; the same object if it is there."""
        if torch.device(device) == self.targets.device:
            return self
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> LineView:
        """Return the view in page-locked memory, from which a data loader copies to a GPU while it works."""
        return self._map(lambda value: value.pin_memory())

    def _map(self, function: Callable[[Any], Any]) -> LineView:
        return self._replace(
            rows=[{name: function(value) for name, value in row.items()} for row in self.rows],
            targets=function(self.targets),
            token_weights=None if self.token_weights is None else function(self.token_weights),
        )
