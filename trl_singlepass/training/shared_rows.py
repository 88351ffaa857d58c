"""Rows that ranks share under sequence parallelism: every rank of a group gets each row of the group, in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset

from ..attention.row_group import RowGroup
from ..data.collator import Batch, pad_batch


class SharedRows(IterableDataset[Batch]):
    """
    Rows of all ranks of a group, in turn: the first row of each rank, the second row of each rank, ….

    Rows are token ids and other integers, and every rank gets them whole: which tokens a rank runs depends on how the
    row is run (at once, in waves).

    `loader` has this rank's own rows, and `prepare` is called with each before other ranks get it. `pad_token_id`
    fills rows up; `epoch` returns the number of the epoch that begins.
    """

    def __init__(
        self,
        loader: DataLoader[Batch],
        group: RowGroup,
        prepare: Callable[[Batch], Batch],
        pad_token_id: int,
        epoch: Callable[[], int],
    ) -> None:
        self._loader, self._group, self._prepare = loader, group, prepare
        self._pad_token_id, self._epoch = pad_token_id, epoch

    def __len__(self) -> int:
        return len(self._loader) * self._group.size

    def __iter__(self) -> Iterator[Batch]:
        if hasattr(self._loader, "set_epoch"):
            self._loader.set_epoch(self._epoch())
        for batch in self._loader:
            own = send_to_device(self._ready_to_share(self._prepare(batch)), "cpu")
            rows: list[Batch] = [{} for _ in range(self._group.size)]
            torch.distributed.all_gather_object(rows, own, group=self._group.process_group)
            yield from rows

    def _ready_to_share(self, batch: Batch) -> Batch:
        """Return a batch that the ranks can divide, marked as shared."""
        padded = pad_batch(batch, self._group.padded_length(batch["tree"].plan.length), self._pad_token_id)
        return {**padded, "tree": padded["tree"].replace(is_shared=True)}
