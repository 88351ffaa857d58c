"""What rows store for one another: only what later rows need, found where the docstrings say."""

import numpy as np
import pytest
import torch

from trl_singlepass.recurrent.states import BoundarySlots, BoundaryTensors, RowBoundary


def test_gradients_of_stored_inputs_return_to_the_row_that_made_them():
    layer, tensors = torch.nn.Identity(), BoundaryTensors()
    needed = BoundarySlots(np.array([1]), frozenset())
    first = RowBoundary(3, {0: 1, 1: 2}, needed, {layer: tensors}, stores=True)  # slot 1 is its token 2
    second = RowBoundary(2, {}, needed, {layer: tensors}, stores=True)
    x = torch.tensor([[[1.0], [2.0], [3.0]]], requires_grad=True)
    y = torch.tensor([[[4.0], [5.0]]], requires_grad=True)
    extended_x, extended_y = first.extend(layer, "x", x), second.extend(layer, "x", y)
    assert extended_y.flatten().tolist() == [4.0, 5.0, 3.0]
    (extended_y * torch.tensor([1.0, 1.0, 7.0])[:, None]).sum().backward()
    extended_x[:, :3].sum().backward()
    assert y.grad.flatten().tolist() == [1.0, 1.0]
    assert x.grad.flatten().tolist() == [1.0, 1.0, 8.0]


def test_a_layer_that_runs_twice_in_a_forward_is_refused():
    boundary = RowBoundary(4, {}, BoundarySlots(np.array([2]), frozenset()), {}, stores=True)
    first, second = torch.nn.Identity(), torch.nn.Identity()
    boundary.begin(first)
    boundary.begin(second)
    with pytest.raises(NotImplementedError, match="Identity runs several times in a forward"):
        boundary.begin(first)
