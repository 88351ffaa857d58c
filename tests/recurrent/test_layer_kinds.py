"""How each kind of layer runs on a tree follows from its code; kinds that are not known are refused."""

import pytest
import torch

from support.tiny_causal_lms import tiny_model
from trl_singlepass.engine.enable import UnsupportedModelError, check_model
from trl_singlepass.recurrent import path_dependent_layers
from trl_singlepass.recurrent.layer_kinds import ReplayMode


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
    assert set(path_dependent_layers(tiny_model(model_type)).values()) == {mode}


def test_attention_alone_needs_no_mode():
    assert path_dependent_layers(tiny_model("llama")) == {}


def test_unknown_mixing_layers_are_refused_by_name():
    class MovingAverage(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.average = torch.nn.Conv1d(32, 32, 3, padding=2)

        def forward(self, hidden_states):
            return self.average(hidden_states.mT)[..., : hidden_states.shape[1]].mT

    model = tiny_model("llama")
    model.model.layers[1].mlp = torch.nn.Sequential(model.model.layers[1].mlp, MovingAverage())
    with pytest.raises(UnsupportedModelError, match="has 'MovingAverage' layers; they mix neighbouring tokens"):
        check_model(model)
