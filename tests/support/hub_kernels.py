"""Kernels that stand in for those of the Hub: `kernelize` puts them where transformers has a layer or a function."""

from contextlib import contextmanager

import pytest
from torch import nn


kernels = pytest.importorskip("kernels")


class LocalKernel:
    """A kernel for a layer or function, by what it computes: `self` is the layer whose place it takes."""

    def __init__(self, forward):
        self.layer = type("LocalKernel", (nn.Module,), {"forward": forward})

    def load(self):
        return self.layer


@contextmanager
def hub_kernels(model, **forwards):
    """Run a model on these kernels within a block, as transformers does that loads it with `use_kernels=True`."""
    modes = (kernels.Mode.TRAINING, kernels.Mode.INFERENCE)
    mapping = {name: {"cpu": dict.fromkeys(modes, LocalKernel(forward))} for name, forward in forwards.items()}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        model.set_use_kernels(True)
        yield model
