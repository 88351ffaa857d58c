"""The first layers of a model: their configuration, and how many fit."""

import pytest
import torch
from transformers import GptOssConfig, Qwen3Config

from trl_singlepass.reference.doctor import slices
from trl_singlepass.reference.doctor.slices import layers_that_fit, slice_config


SMALL = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
DENSE = Qwen3Config(**SMALL, num_key_value_heads=2, num_hidden_layers=12)
MIXED = GptOssConfig(**SMALL, num_key_value_heads=2, num_hidden_layers=12, num_local_experts=4)
CPU = torch.device("cpu")


def test_lists_with_an_entry_per_layer_are_cut_with_the_layers():
    config = slice_config(MIXED, 3)
    assert config.num_hidden_layers == 3
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert (MIXED.num_hidden_layers, len(MIXED.layer_types)) == (12, 12)


def test_a_cpu_runs_a_few_layers():
    assert layers_that_fit(DENSE, 100, CPU) == slices.MOST_LAYERS_ON_CPU


def test_as_many_layers_run_as_fit(monkeypatch):
    def free_for(num_layers):
        needed = slices._bytes_of_slice(slice_config(MIXED, num_layers), 1000)
        monkeypatch.setattr(slices, "_free_bytes", lambda device: needed / slices.SHARE_OF_FREE_MEMORY + 1)

    free_for(3)
    assert layers_that_fit(MIXED, 1000, CPU) == 3
    free_for(1)
    with pytest.raises(ValueError, match=r"the first 2 of 12 layers fit.*name a smaller model"):  # one of each type
        layers_that_fit(MIXED, 1000, CPU)
