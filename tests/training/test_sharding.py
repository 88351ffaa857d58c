"""FSDP2 shards the layers that a model has."""

from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin

from support.tiny_causal_lms import tiny_model
from trl_singlepass.training.sharding import prepare_sharding


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "2")
    return FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")


def sharded(plugin):
    return {layer.__name__ for layer in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}


def on_fsdp(plugin):
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=plugin))


def test_layers_that_only_another_model_of_the_family_has_are_left_out(plugin):
    model = tiny_model("qwen3_5_text")  # which reads no images
    assert "Qwen3_5VisionBlock" in model._no_split_modules
    prepare_sharding(model, on_fsdp(plugin))
    plugin.set_auto_wrap_policy(model)
    assert sharded(plugin) == {"Qwen3_5DecoderLayer"}


def test_layers_that_the_user_names_are_kept(plugin):
    model = tiny_model("qwen3_5_text")
    plugin.transformer_cls_names_to_wrap = ["Qwen3_5MLP"]
    prepare_sharding(model, on_fsdp(plugin))
    plugin.set_auto_wrap_policy(model)
    assert sharded(plugin) == {"Qwen3_5MLP"}
