"""What engines are told about the layers of a model: those that ZeRO-3 gathers and that FSDP2 shards as a whole."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model

from support.float64_comparison import forward
from support.sample_sets import reasoning_chat
from support.tiny_models import model_of_type
from support.trainers import needs_cached_states
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.training.sharding import make_leaves, prepare_sharding


pytestmark = needs_cached_states


def on_stage(stage):
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)))


def leaves(model):
    return {type(module).__name__ for module in model.modules() if getattr(module, "_z3_leaf", False)}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3_5_moe_text", {"Qwen3_5MoeGatedDeltaNet", "Qwen3_5MoeExperts"}),
        ("bamba", {"BambaMixer"}),
        ("lfm2", {"Lfm2ShortConv"}),
        ("recurrent_gemma", {"RecurrentGemmaRecurrentBlock"}),
        ("zaya", {"ZayaCCAProjection", "ZayaExperts"}),
        ("longcat_flash", {"LongcatFlashExperts"}),
        ("qwen3", set()),
    ],
)
def test_recurrent_layers_and_experts_are_leaves(family, expected):
    model = model_of_type(family)
    make_leaves(model, on_stage(2))
    assert leaves(model) == set()
    make_leaves(model, on_stage(3))
    assert leaves(model) == expected


def test_inputs_of_leaves_have_gradients_and_come_by_position():
    """DeepSpeed counts the gradients of arguments by position; a frozen embedding gives none."""
    model = get_peft_model(model_of_type("qwen3_5_text"), LoraConfig(target_modules="all-linear"))
    make_leaves(model, on_stage(3))
    seen = []
    for module in model.modules():
        if getattr(module, "_z3_leaf", False):
            module.register_forward_pre_hook(lambda _, args: seen.extend(args))
    tokens = torch.arange(8)[None]
    model(input_ids=tokens)
    assert [hidden_states.shape for hidden_states in seen] == [(1, 8, 32)]
    assert seen[0].requires_grad
    with torch.no_grad():
        model(input_ids=tokens)
    assert not seen[1].requires_grad


@pytest.mark.parametrize("family", ["zaya", "lfm2"])
def test_a_mask_that_comes_by_position_keeps_its_tree(family):
    """DeepSpeed has a full backward hook on each leaf, for which autograd copies tensors that come by position."""
    model = model_of_type(family)
    enable_tree(model)
    samples = [reasoning_chat(3)]
    expected = forward(model, samples)[0].logits
    make_leaves(model, on_stage(3))
    for module in model.modules():
        if getattr(module, "_z3_leaf", False):
            module.register_full_backward_hook(lambda *_: None)
    assert torch.equal(forward(model, samples)[0].logits, expected)


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "2")
    return FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")


def sharded(plugin):
    return {layer.__name__ for layer in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}


def on_fsdp(plugin):
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=plugin))


def test_layers_that_only_another_model_of_the_family_has_are_left_out(plugin):
    model = model_of_type("qwen3_5_text")  # which reads no images
    assert "Qwen3_5VisionBlock" in model._no_split_modules
    prepare_sharding(model, on_fsdp(plugin))
    plugin.set_auto_wrap_policy(model)
    assert sharded(plugin) == {"Qwen3_5DecoderLayer"}


def test_layers_that_the_user_names_are_kept(plugin):
    model = model_of_type("qwen3_5_text")
    plugin.transformer_cls_names_to_wrap = ["Qwen3_5MLP"]
    prepare_sharding(model, on_fsdp(plugin))
    plugin.set_auto_wrap_policy(model)
    assert sharded(plugin) == {"Qwen3_5MLP"}
