"""Layers that run once over a row: exact with kernels that pad and kernels that pack."""

import sys
from types import FunctionType

import pytest
import torch

from support.fast_scans import packing
from support.float64_comparison import assert_equal_to_npass
from support.model_survey import branchy_chat
from support.sample_sets import branch_at_every_depth, reasoning_chat
from support.tiny_models import model_of_type
from support.trainers import needs_cached_states
from support.tree_masks import tree_of
from trl_singlepass.recurrent.introspection import find_row_kernels, path_dependent_layers
from trl_singlepass.recurrent.row_kernels import SCANS, RowKernels, takes_packed_sequences


pytestmark = needs_cached_states

ON_THE_ROW = [
    *("bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "inkling_text", "kimi_linear", "lfm2", "lfm2_moe"),
    *("lfm3", "mamba2", "nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"),
    *("qwen4_exp_text", "zamba2"),
]


def modelling_module(model):
    layer = next(layer for layer, mode in path_dependent_layers(model).items() if find_row_kernels(layer, mode))
    return sys.modules[type(layer).__module__]


@pytest.mark.parametrize("model_type", ON_THE_ROW)
def test_families_that_run_once_over_the_row(model_type):
    assert modelling_module(model_of_type(model_type))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "olmo_hybrid", "kimi_linear"])
def test_kernels_that_pack(model_type, monkeypatch):
    model = model_of_type(model_type)
    module = modelling_module(model)
    name = next(name for name in SCANS if hasattr(module, name))
    assert not takes_packed_sequences(getattr(module, name))
    scan = packing(getattr(module, name))
    monkeypatch.setattr(module, name, scan)
    assert takes_packed_sequences(scan)
    assert_equal_to_npass(
        model, [branch_at_every_depth(), reasoning_chat(2), branchy_chat(), reasoning_chat(2, seed=1)]
    )
    assert scan.num_packed_calls > 0


def test_a_layer_that_does_not_call_its_scan_is_refused():
    layer = next(iter(path_dependent_layers(model_of_type("qwen3_5_text"))))

    def forward(self, hidden_states, cache=None):
        return causal_conv1d_fn(hidden_states.mT, self.conv1d.weight.squeeze(1)[:32]).mT  # noqa: F821

    module = sys.modules[type(layer).__module__]
    kernels = RowKernels(FunctionType(forward.__code__, vars(module), None, (None,)), "torch_chunk_gated_delta_rule")
    tree = tree_of([reasoning_chat(2)])
    x = torch.zeros(1, tree.plan.length, 32)
    with pytest.raises(RuntimeError, match=r"did not call \['torch_chunk_gated_delta_rule'\]"):
        kernels.run(layer, {"hidden_states": x}, tree)
