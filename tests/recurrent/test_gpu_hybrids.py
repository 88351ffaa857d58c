"""On a GPU in bfloat16: hybrids on fast kernels are at most twice as far from PyTorch's code as N-pass is."""

import pytest
import torch

from support.gpu_or_cpu import DEVICE, needs_device
from support.half_precision import assert_at_most_twice_the_error
from support.sample_sets import reasoning_chat
from support.tiny_models import model_of_type
from support.trainers import needs_cached_states
from trl_singlepass.recurrent import scan_check
from trl_singlepass.recurrent.introspection import path_dependent_layers


pytestmark = [needs_cached_states, pytest.mark.filterwarnings("ignore")]
# Kernels multiply blocks of 16 at least.
DELTA = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
MODELS = {"qwen3_5_text": DELTA, "qwen3_next": DELTA, "bamba": {}, "lfm2": {}, "jamba": {}, "kimi_linear": {}}


def check(model_type, device):
    torch.manual_seed(0)
    model = model_of_type(model_type, **MODELS[model_type], initializer_range=0.05).bfloat16()
    assert list(path_dependent_layers(model))
    assert_at_most_twice_the_error(model, reasoning_chat(turns=4), device)


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("model_type", MODELS)
def test_error_is_at_most_twice_that_of_npass(model_type):
    check(model_type, DEVICE)


@pytest.mark.gpu
@needs_device
def test_the_scan_of_this_machine_is_right():
    """What the first row of a training run checks, for the shape of released models."""
    fla = pytest.importorskip("fla.ops.gated_delta_rule", reason="needs flash-linear-attention")
    sizes = scan_check.ScanSizes(16, 32, 128, 128)
    scan_check.compare_scan(fla.chunk_gated_delta_rule, sizes, torch.device(DEVICE), torch.bfloat16)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "lfm2"])
def test_the_same_comparison_on_cpu(model_type):
    check(model_type, "cpu")
