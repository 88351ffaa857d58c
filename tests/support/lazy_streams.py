"""A device whose copies run as late as they may: at the first event behind them that the computation waits for."""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from trl_singlepass.attention.offload import Streams


class LazyStreams(Streams):
    """Copies leave NaN until then, so that reading one too early shows in every number that follows."""

    def __init__(self):
        self.queue, self.done = [], 0

    @contextmanager
    def copies_after_computation(self):
        with _Queued(self):
            yield

    def record_copies(self):
        return len(self.queue)

    def wait_for(self, event):
        for target, source in self.queue[self.done : event]:
            target.copy_(source)
        self.done = max(self.done, event)

    def protect(self, tensor):
        """Memory of tensors in the queue is not reused anyway."""


class _Queued(TorchFunctionMode):
    def __init__(self, streams):
        self.streams = streams

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.copy_:
            return func(*args, **(kwargs or {}))
        target, source = args
        assert kwargs == {"non_blocking": True}
        assert target.is_contiguous()
        assert source.is_contiguous()
        target.fill_(torch.nan)
        self.streams.queue.append((target, source))
        return target
