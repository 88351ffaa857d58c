"""Layers that run once over a row: exact with kernels that pad and kernels that pack."""

import inspect
import sys
from itertools import pairwise

import pytest
import torch

from support.float64_comparison import assert_equal_to_npass, forward
from support.row_training import assert_waves_equal_npass
from support.sample_sets import branch_at_every_depth, branchy_chat, reasoning_chat
from support.tiny_models import model_of_type, without_router_loss
from support.trainers import needs_cached_states
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.recurrent.measurement import measured_layers, path_dependent_layers
from trl_singlepass.recurrent.row_kernels import SCANS


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
    layer = next(layer for layer, replay in measured_layers(model).items() if replay.kernels is not None)
    return sys.modules[type(layer).__module__]


def use_packing_scan(model_type, monkeypatch):
    """Let the scan of a model's family keep packed sequences apart; return it."""
    module = modelling_module(model_of_type(model_type))
    name = next(name for name in SCANS if hasattr(module, name))
    scan = packing(getattr(module, name))
    monkeypatch.setattr(module, name, scan)
    return scan


@pytest.mark.parametrize("model_type", ON_THE_ROW)
def test_families_that_run_once_over_the_row(model_type):
    assert modelling_module(model_of_type(model_type))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "olmo_hybrid", "kimi_linear"])
def test_kernels_that_pack(model_type, monkeypatch):
    scan = use_packing_scan(model_type, monkeypatch)
    chats = [branch_at_every_depth(), reasoning_chat(2), branchy_chat(), reasoning_chat(2, seed=1)]
    assert_equal_to_npass(model_of_type(model_type), chats)
    assert scan.num_packed_calls > 0


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "olmo_hybrid", "kimi_linear"])
def test_kernels_that_pack_run_at_most_twice_in_a_wave(model_type, monkeypatch):
    scan = use_packing_scan(model_type, monkeypatch)
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


def test_a_layer_that_does_not_call_its_scan_any_more_is_refused(monkeypatch):
    model = model_of_type("qwen3_5_text")
    module = modelling_module(model)
    enable_tree(model)
    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", inspect.unwrap(module.torch_chunk_gated_delta_rule))
    with pytest.raises(RuntimeError, match=r"did not call \['torch_chunk_gated_delta_rule'\]"):
        forward(model, [reasoning_chat(2)])
