"""Layers that run once over a row: exact with kernels that pad and kernels that pack."""

import sys
from itertools import pairwise
from types import FunctionType

import pytest
import torch

from support.float64_comparison import assert_equal_to_npass
from support.row_training import assert_waves_equal_npass
from support.sample_sets import branch_at_every_depth, branchy_chat, reasoning_chat
from support.tiny_models import model_of_type, without_router_loss
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


def packing(scan):
    """Let one of transformers' scans keep packed sequences apart as fla's do, which needs a GPU: one by one."""

    def packed_scan(query, key, value, g, beta, initial_state=None, cu_seqlens=None, **options):
        packed_scan.num_calls += 1
        if cu_seqlens is None:
            return scan(query, key, value, g=g, beta=beta, initial_state=initial_state, **options)
        assert len(query) == 1
        ends = cu_seqlens.tolist()
        assert initial_state is None or len(initial_state) == len(ends) - 1
        outputs, states = [], []
        for index, (start, end) in enumerate(pairwise(ends)):
            state = None if initial_state is None else initial_state[index : index + 1]
            parts = (x[:, start:end] for x in (query, key, value))
            output, state = scan(*parts, g=g[:, start:end], beta=beta[:, start:end], initial_state=state, **options)
            outputs.append(output)
            states.append(state)
        packed_scan.num_packed_calls += 1
        return torch.cat(outputs, dim=1), None if state is None else torch.cat(states)

    packed_scan.num_calls = packed_scan.num_packed_calls = 0
    return packed_scan


def modelling_module(model):
    layer = next(layer for layer, mode in path_dependent_layers(model).items() if find_row_kernels(layer, mode))
    return sys.modules[type(layer).__module__]


def use_packing_scan(model, monkeypatch):
    """Let the scan of a model's family keep packed sequences apart; return it."""
    module = modelling_module(model)
    name = next(name for name in SCANS if hasattr(module, name))
    assert not takes_packed_sequences(getattr(module, name))
    scan = packing(getattr(module, name))
    monkeypatch.setattr(module, name, scan)
    assert takes_packed_sequences(scan)
    return scan


@pytest.mark.parametrize("model_type", ON_THE_ROW)
def test_families_that_run_once_over_the_row(model_type):
    assert modelling_module(model_of_type(model_type))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "olmo_hybrid", "kimi_linear"])
def test_kernels_that_pack(model_type, monkeypatch):
    model = model_of_type(model_type)
    scan = use_packing_scan(model, monkeypatch)
    assert_equal_to_npass(
        model, [branch_at_every_depth(), reasoning_chat(2), branchy_chat(), reasoning_chat(2, seed=1)]
    )
    assert scan.num_packed_calls > 0


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "olmo_hybrid", "kimi_linear"])
def test_kernels_that_pack_run_at_most_twice_in_a_wave(model_type, monkeypatch):
    scan = use_packing_scan(model_of_type(model_type), monkeypatch)
    runs = []

    def count(model):
        for layer in path_dependent_layers(model):
            layer.register_forward_pre_hook(lambda layer, args: runs.append(layer))
        scan.num_calls = 0

    for samples, size in ((branch_at_every_depth(), 1), (branch_at_every_depth(), 9), (branchy_chat(), 100)):
        runs.clear()
        assert_waves_equal_npass(without_router_loss(model_type), [samples], [size], count)
        assert 0 < scan.num_calls <= 2 * len(runs)
    assert scan.num_packed_calls > 0


def test_a_layer_that_does_not_call_its_scan_is_refused():
    layer, mode = next(iter(path_dependent_layers(model_of_type("qwen3_5_text")).items()))

    def forward(self, hidden_states, cache=None):
        return causal_conv1d_fn(hidden_states.mT, self.conv1d.weight.squeeze(1)[:32]).mT  # noqa: F821

    module = sys.modules[type(layer).__module__]
    kernels = RowKernels(
        FunctionType(forward.__code__, vars(module), None, (None,)), "torch_chunk_gated_delta_rule", mode
    )
    tree = tree_of([reasoning_chat(2)])
    x = torch.zeros(1, tree.plan.length, 32)
    with pytest.raises(RuntimeError, match=r"did not call \['torch_chunk_gated_delta_rule'\]"):
        kernels.run(layer, {"hidden_states": x}, tree)
