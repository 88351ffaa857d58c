"""Launches are counted forward and backward."""

import torch

from benchmarks.launches import LaunchCounter


def test_launches_are_operators_that_write():
    x = torch.ones(3, 4, requires_grad=True)
    with LaunchCounter() as counter:
        y = torch.nn.functional.scaled_dot_product_attention(*[x.view(1, 1, 3, 4)] * 3, is_causal=True)
        y.exp().sum().backward()
    assert counter.operators["aten::exp"] == 1
    assert counter.operators["aten::mul"] == 1  # the gradient of exp
    assert not {"aten::view", "aten::detach", "aten::expand", "aten::empty"} & counter.operators.keys()
    assert [name for name in counter.attention_operators if name.endswith("_backward")] != []
    assert counter.total == sum(counter.operators.values())
    before = counter.total
    x.exp()
    assert counter.total == before
