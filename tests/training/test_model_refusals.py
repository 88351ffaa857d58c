"""Models that no tree can reach are refused when they are switched."""

import pytest
from transformers import BloomConfig, BloomForCausalLM

from support.tiny_families import tiny_model
from trl_singlepass.engine.enable import UnsupportedModelError, enable_tree


def test_models_that_do_not_take_attention_from_outside_are_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM does not take its attention function"):
        enable_tree(model)


def test_models_in_8_bits_are_refused():
    model = tiny_model("qwen3", attn_implementation="sdpa")
    model.is_loaded_in_8bit = True  # as transformers marks it
    with pytest.raises(UnsupportedModelError, match=r"is loaded in 8 bits \(load_in_8bit\).*Use load_in_4bit"):
        enable_tree(model)
