"""Keys and values gathered along paths, and the sum of the gradients that come back to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .kv_cache import FetchedSlots, KVCacheView


KeysAndValues = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each of shape `(num_keys, kv_heads, head_dim)`."""


def join_with_slots(key: torch.Tensor, value: torch.Tensor, fetched: FetchedSlots | None) -> torch.Tensor:
    """
    Return the keys and values of a row, followed by those of ancestors outside it.

    Takes shape `(row_length, kv_heads, head_dim)`, returns `(2, row_length + num_fetched, kv_heads, head_dim)`.
    """
    if fetched is None:
        return torch.stack([key, value])
    length = len(key)
    joined = key.new_empty(2, length + fetched.kv.shape[1], *key.shape[1:])
    joined[0, :length], joined[1, :length], joined[:, length:] = key, value, fetched.kv
    return joined


class PathGradients:
    """
    Sum of the gradients of gathered keys and values: history gets one from every branch, added up in float32 at least.

    Takes the keys of the row, `(row_length, kv_heads, head_dim)`, and the number of keys gathered from outside the
    row. A deterministic sum adds in a fixed order, which is slower.
    """

    def __init__(self, key: torch.Tensor, num_slots: int, deterministic: bool) -> None:
        self.length = len(key)
        self.dtype, self.deterministic = torch.promote_types(key.dtype, torch.float32), deterministic
        self._shape = (2, len(key) + num_slots, *key.shape[1:])
        self._total: torch.Tensor | None = None

    def add(
        self, grad_keys: Sequence[torch.Tensor], grad_values: Sequence[torch.Tensor], index: torch.Tensor | None
    ) -> None:
        """
        Add the gradients of a pass, each of shape `(num_keys, kv_heads, head_dim)`, one per call.

        `index` has the positions of the keys of all calls, `None` if they are the row as it is.
        """
        joined = torch.cat([*grad_keys, *grad_values]).view(2, -1, *self._shape[2:]).to(self.dtype)
        if index is None:
            self._total = joined
            return
        if self._total is None:
            self._total = joined.new_zeros(self._shape)
        if self.deterministic:  # sorts the index; `index_add_` adds in whatever order threads come
            self._total.transpose(0, 1).index_put_((index.long(),), joined.transpose(0, 1), accumulate=True)
        else:
            self._total.index_add_(1, index, joined)

    def finish(
        self, cache: KVCacheView | None, fetched: FetchedSlots | None, handed_on: torch.Tensor | None
    ) -> torch.Tensor:
        """
        Return the gradients of the row's keys and values, and hand on those of ancestors outside it.

        The cache gives what later rows sent back; `handed_on` has the positions of tokens that later rows attend to,
        if they do not lie together. Returns shape `(2, row_length, kv_heads, head_dim)`.
        """
        assert self._total is not None, "a row has at least one call"
        own, outside = self._total[:, : self.length], self._total[:, self.length :]
        if cache is not None:
            if fetched is not None:
                cache.add_gradients(fetched, outside)
            cache.add_gradients_from_later_rows(own, handed_on)
        return own
