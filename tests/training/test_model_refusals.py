"""Models that tree attention cannot reach are refused: when they are switched, or after the first forward."""

import pytest
from transformers import BloomConfig, BloomForCausalLM

from support.sample_sets import reasoning_chat
from support.tiny_families import tiny_model
from support.tree_masks import tree_of
from trl_singlepass.engine.enable import UnsupportedModelError, check_every_layer_attended, enable_tree


def test_models_that_do_not_take_attention_from_outside_are_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM does not take its attention function"):
        enable_tree(model)


def test_models_in_8_bits_are_refused():
    model = tiny_model("qwen3", attn_implementation="sdpa")
    model.is_loaded_in_8bit = True  # as transformers marks it
    with pytest.raises(UnsupportedModelError, match=r"is loaded in 8 bits \(load_in_8bit\).*Use load_in_4bit"):
        enable_tree(model)


def test_a_layer_that_does_not_receive_the_tree_is_found():
    model = tiny_model("qwen3", attn_implementation="sdpa")
    enable_tree(model)
    tree = tree_of([reasoning_chat()])
    tree.attended_by.add(model.model.layers[0].self_attn)
    with pytest.raises(UnsupportedModelError, match="Qwen3ForCausalLM did not receive the tree in 'Qwen3Attention'"):
        check_every_layer_attended(model, tree)
    tree.attended_by.add(model.model.layers[1].self_attn)
    check_every_layer_attended(model, tree)
