"""Errors of half precision on a device: the single pass's and N-pass's own, against the same weights in float64."""

import copy

import torch

from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.reference import npass_loss_and_gradients
from trl_singlepass.reference.single_pass import single_pass_loss_and_gradients
from trl_singlepass.reference.verification import ForcedFloat64


def flat(gradients):
    """Return gradients by name as one vector in float64 on the CPU."""
    return torch.cat([gradient.double().flatten().cpu() for gradient in gradients.values()])


def errors_of_npass(model, samples, device):
    """
    Return gradients in float64 on the CPU, and how far N-pass in bfloat16 on the device is from them.

    The model is in bfloat16, on the CPU.
    """
    with ForcedFloat64():
        exact = flat(npass_loss_and_gradients(copy.deepcopy(model).double(), samples).gradients)
    own = flat(npass_loss_and_gradients(copy.deepcopy(model).to(device), samples).gradients)
    return exact, float((own - exact).norm())


def assert_at_most_twice_the_error(model, samples, device, gradients_of=None):
    """
    Assert that the gradients of a single pass are at most twice as far from float64 as those of N-pass.

    `gradients_of` enables trees on a model on the device, and computes them by name; in one row by default.
    """
    exact, allowed = errors_of_npass(model, samples, device)
    ours = copy.deepcopy(model).to(device)
    if gradients_of is None:
        enable_tree(ours)
        gradients = single_pass_loss_and_gradients(ours, samples).gradients
    else:
        gradients = gradients_of(ours)
    error = float((flat(gradients) - exact).norm())
    assert error <= 2 * allowed
    assert allowed <= 0.2 * float(exact.norm()), "N-pass itself is far off, so that the comparison says little"
