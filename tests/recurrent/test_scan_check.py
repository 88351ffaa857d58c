"""A kernel of the gated delta rule that is wrong is refused before anything is trained."""

import functools
import sys

import pytest
import torch

from support.float64_comparison import forward
from support.sample_sets import reasoning_chat
from support.tiny_models import model_of_type
from support.trainers import needs_cached_states
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.recurrent import scan_check
from trl_singlepass.recurrent.scan_check import ScanSizes, compare_scan


pytestmark = [needs_cached_states, pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")]

NAME = "torch_chunk_gated_delta_rule"


class ScaledGradient(torch.autograd.Function):
    """Return the input; its gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def plant(scan, factor):
    """Return a scan whose gradient of `beta` is wrong by a factor, as with Triton 3.4 on Hopper."""

    @functools.wraps(scan)
    def planted(*args, beta, **options):
        return scan(*args, beta=ScaledGradient.apply(beta, factor), **options)

    return planted


@pytest.fixture
def model():
    return model_of_type("qwen3_5_text").float()


@pytest.fixture
def module(model):
    return sys.modules[type(model).__module__]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_kernel_passes(module, dtype):
    compare_scan(plant(getattr(module, NAME), 1.0), ScanSizes(2, 4, 16, 8), torch.device("cpu"), dtype)


BOTH_NUMBERS = r"gradient of beta has norm [\d.]+ where the rule itself gives [\d.]+, and they differ by 0.5"


@pytest.mark.parametrize(("factor", "norms"), [(1.5, BOTH_NUMBERS), (float("nan"), "has norm nan")])
def test_a_wrong_kernel_is_refused_with_both_numbers(module, factor, norms):
    with pytest.raises(RuntimeError, match=norms):
        compare_scan(plant(getattr(module, NAME), factor), ScanSizes(2, 4, 16, 8), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_row_compares_once(model, module, monkeypatch, checkpointing):
    monkeypatch.setattr(scan_check, "DEVICES", ("cpu",))
    compared = []
    results = scan_check._results
    monkeypatch.setattr(scan_check, "_results", lambda *args: compared.append(args) or results(*args))
    monkeypatch.setattr(module, NAME, plant(getattr(module, NAME), 1.0))
    enable_tree(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    before = torch.get_rng_state()
    for _ in range(2):
        outputs, _ = forward(model, [reasoning_chat(2)])
        outputs.logits.sum().backward()
    assert len(compared) == 2  # the kernel and PyTorch's code
    assert torch.equal(torch.get_rng_state(), before)


def test_training_on_a_wrong_kernel_is_refused(model, module, monkeypatch):
    monkeypatch.setattr(scan_check, "DEVICES", ("cpu",))
    monkeypatch.setattr(module, NAME, plant(getattr(module, NAME), 1.5))
    with pytest.raises(RuntimeError, match="kernel is wrong on this machine"):
        enable_tree(model)
