"""Copies between a cache on the host and a device, on a stream of their own beside the computation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor


class Streams:
    """The stream that a CUDA device computes on, and one for copies; on other devices, all runs as the host says."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copy: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def copies_after_computation(self) -> Iterator[None]:
        """Run copies inside on their stream, after all that the computation has queued so far."""
        if self.copy is None:
            yield
            return
        self.copy.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self.copy):
            yield

    def record_copies(self) -> Any:
        """Return an event behind the copies queued so far, `None` if they are done."""
        return None if self.copy is None else self.copy.record_event()

    def wait_for(self, event: Any) -> None:
        """Let the computation wait for an event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def protect(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor on the device from being reused before copies queued so far are done."""
        if self.copy is not None:
            tensor.record_stream(self.copy)


_Key: TypeAlias = tuple[int, torch.Size]
"""Address and shape of a tensor on the host."""


@dataclass(frozen=True, slots=True, eq=False)
class _Copy:
    """A tensor on the device, complete once the event is reached."""

    tensor: Tensor
    event: Any


class HostCopies:
    """
    Copies of what the layers of a model hold on the host, for one device.

    All share one stream, so that what was sent to the host is there before it is fetched again. A copy that is fetched
    ahead waits on the device. The last one stays until the next of its kind, because a recomputed layer fetches the
    same twice: for its forward and for its backward pass.
    """

    def __init__(self, device: torch.device, streams: Streams | None = None) -> None:
        self.device = device
        self.streams = streams or Streams(device)
        self._held: defaultdict[Hashable, dict[_Key, _Copy]] = defaultdict(dict)
        self._for_one_use: dict[_Key, _Copy] = {}

    def fetch(self, host: Tensor, ahead: Tensor | None = None, kind: Hashable = None) -> Tensor:
        """
        Return a device copy, which nothing may change, of a host tensor `(2, num_slots, kv_heads, head_dim)`.

        Both halves are contiguous. `ahead` is a tensor of the same kind that is likely to be asked for next: its copy
        starts now. Of each kind, two copies are held.
        """
        wanted = [host] if ahead is None else [host, ahead]
        held = self._held[kind]
        self._held[kind] = {_key(x): held.get(_key(x)) or self._start(x) for x in wanted}
        own = self._held[kind][_key(host)]
        self.streams.wait_for(own.event)
        return own.tensor

    def fetch_for_one_use(self, host: Tensor) -> Tensor:
        """Return a copy on the device of a tensor of the same layout, to be changed and sent back."""
        copy = self._for_one_use.pop(_key(host), None) or self._start(host)
        self.streams.wait_for(copy.event)
        return copy.tensor

    def start_for_one_use(self, host: Tensor) -> None:
        """Start the copy that [`fetch_for_one_use`] returns next."""
        if _key(host) not in self._for_one_use:
            self._for_one_use[_key(host)] = self._start(host)

    def send(self, tensor: Tensor, host: Tensor) -> None:
        """Copy a tensor, which nothing changes afterwards, to one of the same shape on the host."""
        with self.streams.copies_after_computation():
            for there, here in zip(host, tensor, strict=True):
                there.copy_(here, non_blocking=True)
        self.streams.protect(tensor)

    def _start(self, host: Tensor) -> _Copy:
        # Memory comes from the pool of the computation, and may still be in use there: copies wait for it.
        tensor = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        with self.streams.copies_after_computation():
            for here, there in zip(tensor, host, strict=True):  # contiguous halves, which need no detour
                here.copy_(there, non_blocking=True)
            event = self.streams.record_copies()
        self.streams.protect(tensor)
        return _Copy(tensor, event)


def _key(host: Tensor) -> _Key:
    return host.data_ptr(), host.shape
