"""Every model that a single pass takes, in waves; some call a layer's attention several times in a forward."""

import pytest
import torch

from support.float64_comparison import checkpoint_layers
from support.model_survey import TEXT_MODELS, branchy_chat, class_of, read_page
from support.tiny_models import model_of_type
from support.tiny_multimodal import tiny_conditional
from support.wave_training import assert_waves_equal_npass


pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning"),
]

SEVERAL_CALLS = ["diffllama", "dory"]  # with two values per key; with layers that run in a loop
EXACT = [key for key, outcome in read_page()[1].items() if outcome.status == "exact"]


def model_of(name, table=TEXT_MODELS):
    model = model_of_type(name) if table == TEXT_MODELS else tiny_conditional(class_of(table, name))
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits"):  # that loss is no sum over tokens: tested through the trainer
        config.output_router_logits = False
    return model


@pytest.mark.parametrize("name", SEVERAL_CALLS)
def test_each_call_of_a_layer_has_its_own_keys_and_values(name):
    assert_waves_equal_npass(model_of(name), [branchy_chat()], [40])
    assert_waves_equal_npass(model_of(name), [branchy_chat()], [4], offload=True)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", SEVERAL_CALLS)
def test_checkpointed_layers_that_attend_several_times_are_refused(name, use_reentrant):
    prepare = checkpoint_layers(use_reentrant)
    with pytest.raises(NotImplementedError, match="Attention attends several times in a forward"):
        assert_waves_equal_npass(model_of(name), [branchy_chat()], [40], prepare=prepare)


def test_recurrent_layers_that_run_several_times_are_refused():
    def loop(model):
        model.backbone.layers = torch.nn.ModuleList([model.backbone.layers[0]] * 2)

    with pytest.raises(NotImplementedError, match="runs several times in a forward"):
        assert_waves_equal_npass(model_of("mamba2"), [branchy_chat()], [40], prepare=loop)


@pytest.mark.slow
@pytest.mark.parametrize(("table", "name"), EXACT)
def test_every_model_on_the_page(table, name):
    assert_waves_equal_npass(model_of(name, table), [branchy_chat()], [4, 40])
