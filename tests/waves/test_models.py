"""Every model type that a single pass takes, in waves; some call a layer's attention several times in a forward."""

import pytest

from support.float64_comparison import checkpoint_layers
from support.model_survey import TEXT_MODELS, branchy_chat, read_page
from support.tiny_causal_lms import tiny_model
from support.wave_training import assert_waves_equal_npass


pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning"),
]

SEVERAL_CALLS = ["diffllama", "dory"]  # with two values per key; with layers that run in a loop
EXACT = [
    name for (table, name), outcome in read_page()[1].items() if (table, outcome.status) == (TEXT_MODELS, "exact")
]


def model_of(model_type):
    model = tiny_model(model_type)
    if hasattr(model.config, "output_router_logits"):  # that loss is no sum over tokens: tested through the trainer
        model.config.output_router_logits = False
    return model


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("model_type", SEVERAL_CALLS)
def test_each_call_of_a_layer_has_its_own_keys_and_values(model_type, offload):
    assert_waves_equal_npass(model_of(model_type), [branchy_chat()], [4, 40], offload=offload)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("model_type", SEVERAL_CALLS)
def test_checkpointed_layers_that_attend_several_times_are_refused(model_type, use_reentrant):
    with pytest.raises(NotImplementedError, match="Attention attends several times in a forward"):
        assert_waves_equal_npass(
            model_of(model_type), [branchy_chat()], [40], prepare=checkpoint_layers(use_reentrant)
        )


@pytest.mark.slow
@pytest.mark.parametrize("model_type", EXACT)
def test_every_model_type(model_type):
    assert_waves_equal_npass(model_of(model_type), [branchy_chat()], [4, 40])
