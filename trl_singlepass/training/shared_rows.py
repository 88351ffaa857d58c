"""Rows that ranks share under sequence parallelism: each is cut into one part per rank, and keeps its tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset

from ..data.collator import Batch, pad_batch
from ..trees.prefix_tree import IGNORE_INDEX


if TYPE_CHECKING:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter


class SharedRows(IterableDataset[Batch]):
    """
    Parts of rows: each row of each rank of a group in turn, cut among the ranks of the group.

    Args:
        loader (`UlyssesSPDataLoaderAdapter`):
            DeepSpeed's own loader of such parts, for the loader inside it, its group and its rank.
        prepare (`Callable`):
            Called with each whole row before it is cut.
        pad_token_id (`int`):
            Token that fills rows up.
        epoch (`Callable[[], int]`):
            Returns the number of the epoch that begins.
    """

    def __init__(
        self,
        loader: UlyssesSPDataLoaderAdapter,
        prepare: Callable[[Batch], Batch],
        pad_token_id: int,
        epoch: Callable[[], int],
    ) -> None:
        self._loader, self._prepare, self._pad_token_id, self._epoch = loader, prepare, pad_token_id, epoch

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        loader = self._loader
        if hasattr(loader.dl, "set_epoch"):
            loader.dl.set_epoch(self._epoch())
        rows = (self._ready_to_cut(self._prepare(batch)) for batch in loader.dl)
        yield from type(loader)(rows, loader.sp_rank, loader.sp_group, loader.sp_world_size, loader.device)

    def _ready_to_cut(self, batch: Batch) -> Batch:
        """Return a batch with weights where DeepSpeed puts labels, without what a part of a row cannot use."""
        whole = {name: value for name, value in batch.items() if name != "subtree_end"}
        weights = whole.get("loss_weights", (whole["labels"] != IGNORE_INDEX).float())
        whole["loss_weights"] = F.pad(weights[:, 1:], (0, 1))
        whole["label_parts"] = F.pad(whole["label_parts"][:, 1:], (0, 1))
        return pad_batch(whole, self._common_length(whole["tree_plan"].length), self._pad_token_id)

    def _common_length(self, length: int) -> int:
        """Length that the group can share; gloo gathers only tensors of equal size, other backends of any."""
        size: int = self._loader.sp_world_size
        if self._loader.device.type == "cpu":
            longest = torch.tensor(length)
            torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX, group=self._loader.sp_group)
            length = int(longest)
        return -(-length // size) * size
