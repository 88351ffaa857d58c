"""On every rank, the wrapper of data parallelism runs once per row, whichever way the last wave goes."""

from contextlib import nullcontext

import pytest
import torch

from trl_singlepass.engine.wrapped_model import DataParallelModel


class Wrapper(torch.nn.Module):
    """Stands in for `DistributedDataParallel`, whose forward sends buffers to other ranks."""

    def __init__(self):
        super().__init__()
        self.module, self.forwards = torch.nn.Identity(), 0

    def no_sync(self):
        return nullcontext()

    def forward(self, input):
        self.forwards += 1
        return self.module(input)


@pytest.mark.parametrize("is_kept", [False, True])
def test_only_the_last_wave_runs_the_wrapper(is_kept):
    """Otherwise a rank whose last wave is kept waits for one whose last wave is not, forever."""
    wrapper = Wrapper()
    engine = DataParallelModel(wrapper, accelerator=None, scale=1.0)
    engine.forward(input=torch.ones(1))
    assert wrapper.forwards == 0
    engine.forward_last(is_kept=is_kept, input=torch.ones(1))
    assert wrapper.forwards == 1
