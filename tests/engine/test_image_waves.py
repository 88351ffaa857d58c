"""Float64: a row with images in waves has the loss and every gradient of separate samples, and is encoded once."""

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, inject_adapter_in_model
from trl.trainer.utils import add_fused_lm_head

from support.float64_comparison import CHECKPOINTING, assert_same_loss_and_gradients, float64_head, gradients_of
from support.image_chats import CHATS, image_chat, image_collator
from support.image_models import FAMILIES, image_model, loader
from trl_singlepass.engine.enable import enable_images, enable_tree
from trl_singlepass.engine.row_runner import Factors, RowRunner
from trl_singlepass.engine.wave_plan import WavePlan
from trl_singlepass.engine.wrapped_model import WrappedModel
from trl_singlepass.images.reading import image_module, images_see_themselves
from trl_singlepass.reference import npass_loss_and_gradients
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row


pytestmark = [
    pytest.mark.usefixtures("float64"),
    # New names are not in all releases of transformers that are supported.
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),
]
SIZES = [9, 56]  # images are cut where they may be; a history with images is kept where it may be


@pytest.fixture(autouse=True)
def fused_head_in_float64():
    with float64_head():
        yield


@pytest.fixture
def encodings(monkeypatch):
    """Return a function that counts, for a model, how often its encoder runs: whether with gradients, each time."""

    def count(model):
        kind, runs = type(image_module(model)), []
        encode = kind.get_image_features

        def counted(module, *args, **kwargs):
            runs.append(torch.is_grad_enabled())
            return encode(module, *args, **kwargs)

        monkeypatch.setattr(kind, "get_image_features", counted)
        return runs

    return count


def assert_waves_equal_npass(model, encodings, kind="reasoning", knows_loss=True, prepare=None):
    if hasattr(model.config.get_text_config(), "router_aux_loss_coef"):  # that loss is no sum over tokens
        model.config.get_text_config().output_router_logits = False
    samples = image_chat(model, kind)
    expected = npass_loss_and_gradients(model, samples, load_images=loader(model))
    runs = encodings(model)
    add_fused_lm_head(model)
    enable_tree(model)
    collator = image_collator(model)
    enable_images(model, collator)
    if prepare is not None:
        prepare(model)
    batch = collator([Row.from_tree(PrefixTree.from_samples(samples)).columns()])
    weights = torch.nn.functional.pad((batch["labels"][:, 1:] != -100).double(), (0, 1))
    weights /= weights.sum()
    policy = {"keep_history": knows_loss, "cut_images": not images_see_themselves(model)}
    plans = [WavePlan.from_tree_plan(batch["tree"].plan, size, **policy) for size in SIZES]
    assert len(plans[0].waves) > 1
    for plan in plans:
        model.zero_grad()
        runs.clear()
        wrapped = WrappedModel(model, Accelerator(cpu=True), 1.0)
        runner = RowRunner(wrapped, [batch], [plan], loss=Factors(-weights) if knows_loss else None)
        loss = runner.backward(-(runner(fused_lm_head=True, **batch).log_probs * weights[:, :-1]).sum())
        loss.backward()
        assert_same_loss_and_gradients(float(loss.detach()), gradients_of(model), expected)
        assert runs == ([True] if knows_loss else [False, True])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, encodings):
    assert_waves_equal_npass(image_model(family), encodings)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5", "gemma3"])
def test_a_loss_that_reads_all_waves(family, encodings):
    assert_waves_equal_npass(image_model(family), encodings, knows_loss=False)


@pytest.mark.parametrize("kind", [kind for kind in CHATS if kind != "reasoning"])
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_other_histories(family, kind, encodings):
    assert_waves_equal_npass(image_model(family), encodings, kind)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_checkpointed_layers(checkpointing, encodings):
    assert_waves_equal_npass(image_model("qwen3_vl"), encodings, prepare=CHECKPOINTING[checkpointing])


def test_frozen_encoder(encodings):
    model = image_model("qwen3_vl")
    model.model.visual.requires_grad_(False)
    assert_waves_equal_npass(model, encodings)


def test_lora_on_both(encodings):
    config = LoraConfig(r=2, target_modules=["q_proj", "qkv", "linear_fc1"], init_lora_weights=False)
    model = inject_adapter_in_model(config, image_model("qwen3_vl"))
    assert_waves_equal_npass(model, encodings)
