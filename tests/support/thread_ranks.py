"""Ranks that share a row as threads of one process, with the collectives that `RowGroup` calls."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

import torch

from trl_singlepass.attention.row_group import RowGroup


class ThreadGroup:
    """Stands in for a process group: each thread says which rank it is."""

    def __init__(self, size):
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.sent, self.local = [None] * size, threading.local()
        self.sent_bytes = [0] * size  # to other ranks, by each, in exchanges of parts for heads

    def exchange(self, x):
        """Return what all ranks send, in the order of the ranks."""
        self.sent[self.local.rank] = x.detach().clone()
        self.barrier.wait()
        received = list(self.sent)
        self.barrier.wait()
        return received


def all_to_all_single(output, x, group):
    group.sent_bytes[group.local.rank] += x.numel() * x.element_size() * (group.size - 1) // group.size
    output.copy_(torch.cat([sent.chunk(group.size)[group.local.rank] for sent in group.exchange(x)]))


def all_gather(outputs, x, group):
    for output, sent in zip(outputs, group.exchange(x), strict=True):
        output.copy_(sent)


def all_reduce(x, group):
    x.copy_(torch.stack(group.exchange(x)).sum(0))


def on_ranks(size, function):
    """Run a function of a `RowGroup` on each of `size` ranks; return the results in the order of the ranks."""
    group = ThreadGroup(size)

    def run(rank):
        group.local.rank = rank
        try:
            return function(RowGroup(group, size, rank))
        except BaseException:
            group.barrier.abort()  # the others wait for this rank
            raise

    with _collectives(), ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [future.exception() for future in futures if future.exception() is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return [future.result() for future in futures]


@contextmanager
def _collectives():
    fakes = {"all_to_all_single": all_to_all_single, "all_gather": all_gather, "all_reduce": all_reduce}
    with mock.patch.multiple(torch.distributed, **fakes):
        yield
