"""How each kind of layer runs on a tree follows from its code."""

import pytest

from support.tiny_models import model_of_type
from trl_singlepass.recurrent.introspection import path_dependent_layers
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


def test_attention_alone_needs_no_mode():
    assert path_dependent_layers(model_of_type("llama")) == {}
