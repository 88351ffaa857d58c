"""How each kind of layer runs on a tree is measured."""

import copy

import pytest
import torch

from support.float64_comparison import assert_equal_to_npass
from support.planted_layers import OwnAttention
from support.sample_sets import branchy_chat, reasoning_chat
from support.tiny_models import model_of_type, tiny_model
from trl_singlepass.recurrent.measurement import path_dependent_layers
from trl_singlepass.recurrent.schedule import ReplayMode


@pytest.mark.parametrize(
    ("model_type", "mode"),
    [
        ("qwen3_5_text", ReplayMode(starts_from_state=True)),
        ("lfm2", ReplayMode(starts_from_state=False, reach=2)),
        ("jamba", ReplayMode(starts_from_state=False)),
        ("deepseek_v32", ReplayMode(starts_from_state=False, attends=True)),
    ],
)
def test_modes(model_type, mode):
    assert set(path_dependent_layers(model_of_type(model_type)).values()) == {mode}


@pytest.mark.usefixtures("float64")
def test_attention_that_takes_no_function_from_outside_runs_over_whole_paths():
    model = tiny_model("qwen3")
    layer = model.model.layers[-1]
    own = OwnAttention(model.config, 1).double()
    own.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = own
    assert path_dependent_layers(model) == {own: ReplayMode(starts_from_state=False)}
    assert_equal_to_npass(model, [reasoning_chat(2), branchy_chat()])


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "recurrent_gemma", "qwen3"])
def test_measuring_leaves_the_model_as_it_was(model_type):
    model = (tiny_model if model_type == "qwen3" else model_of_type)(model_type)
    before = copy.deepcopy(model)
    path_dependent_layers(model)
    assert model.training
    assert model.config.to_dict() == before.config.to_dict()
    assert model.config._attn_implementation == before.config._attn_implementation
    for ours, theirs in zip(model.modules(), before.modules(), strict=True):
        assert vars(ours).keys() == vars(theirs).keys()
        assert not any(isinstance(x, torch.Tensor) for x in vars(ours).values())


def test_attention_alone_needs_no_mode():
    assert path_dependent_layers(model_of_type("llama")) == {}
