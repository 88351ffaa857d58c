"""Kernels of the Hub in the place of a recurrent layer, or of the functions that it calls: exact, or refused."""

import inspect

import pytest
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5

from support.float64_comparison import assert_equal_to_npass
from support.hub_kernels import hub_kernels
from support.sample_sets import reasoning_chat
from support.tiny_models import model_of_type
from support.tree_checks import checked


pytestmark = pytest.mark.usefixtures("float64")
MODULES = {"qwen3_5_text": modeling_qwen3_5, "mamba2": modeling_mamba2}
# Names under which `kernelize` looks for kernels, with the function or class of transformers in whose place they go.
PLACES = [
    ("qwen3_5_text", "causal_conv1d_forward", "causal_conv1d_forward"),
    ("qwen3_5_text", "causal_conv1d_fn", "causal_conv1d_fn"),
    ("qwen3_5_text", "chunk_gated_delta_rule", "torch_chunk_gated_delta_rule"),
    ("qwen3_5_text", "RMSNormGated", "Qwen3_5RMSNormGated"),
    ("qwen3_5_text", "Qwen3_5GatedDeltaNet", "Qwen3_5GatedDeltaNet"),
    ("mamba2", "causal_conv1d_forward", "causal_conv1d_forward"),
    ("mamba2", "mamba2_scan_forward", "mamba2_scan_forward"),
]


def kernel_for(model_type, place, change=lambda output: output):
    """Return a kernel that computes what is in its place, changed, and the list of its calls."""
    stock, calls = getattr(MODULES[model_type], place), []
    stock = getattr(stock, "kernel", stock)  # of a function that is interposed
    forward = (stock if isinstance(stock, type) else type(stock)).forward

    def kernel(self, *args, **kwargs):
        calls.append(place)
        return change(forward(self, *args, **kwargs))

    kernel.__signature__ = inspect.signature(forward)
    return kernel, calls


@pytest.mark.parametrize(("model_type", "name", "place"), PLACES)
def test_a_kernel_that_computes_the_same_is_exact(model_type, name, place):
    kernel, calls = kernel_for(model_type, place)
    with hub_kernels(model_of_type(model_type), **{name: kernel}) as model:
        assert_equal_to_npass(model, [reasoning_chat()])
        assert calls


# Where the tokens are in what a kernel returns.
AXES = {"causal_conv1d_forward": -1, "causal_conv1d_fn": -1, "Qwen3_5RMSNormGated": 0}


@pytest.mark.parametrize(("model_type", "name", "place"), PLACES)
def test_a_kernel_that_looks_ahead_is_refused(model_type, name, place):
    def change(output):
        """Add what was computed for the next token."""
        first, *others = output if isinstance(output, tuple) else (output,)
        first = first + 0.1 * first.roll(-1, AXES.get(place, 1))
        return (first, *others) if others else first

    kernel, _ = kernel_for(model_type, place, change)
    with hub_kernels(model_of_type(model_type), **{name: kernel}) as model:
        assert not checked(model).ok


@pytest.mark.parametrize("model_type", MODULES)
def test_evaluation_puts_kernels_in_place_again_and_trees_stay(model_type):
    """`model.eval()` and `model.train()` call `kernelize`, which resets the `forward` of layers without a kernel."""
    model = model_of_type(model_type)
    with hub_kernels(model):
        assert checked(model).ok
        model.eval().train()
        assert checked(model).ok
        assert_equal_to_npass(model, [reasoning_chat()])
