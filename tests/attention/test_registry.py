"""The names of tree attention: which `attn_implementation` means which, and what a saved model shows of it."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, modeling_utils

from benchmarks import gpu_step
from support.tiny_models import tiny_model
from trl_singlepass.attention.registry import tree_attention_name
from trl_singlepass.engine.enable import enable_tree


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("implementation", "name"),
    [("sdpa", "tree_torch"), ("eager", "tree_torch"), ("flex_attention", "tree_flex"), ("tree_flex", "tree_flex")],
)
def test_names_without_a_package(implementation, name):
    assert tree_attention_name(implementation) == name


def test_enable_tree_names_an_unknown_implementation():
    model = tiny_model("qwen3")
    model.config._attn_implementation = "paged|eager"
    with pytest.raises(ValueError, match=r"attn_implementation='paged\|eager'.*'sdpa'"):
        enable_tree(model)


def test_switching_twice_changes_nothing():
    model = tiny_model("qwen3", attn_implementation="sdpa")
    assert enable_tree(model) == "sdpa"
    assert enable_tree(model) == model.config._attn_implementation


def test_the_saved_config_holds_no_trace_of_tree_attention(tmp_path):
    model = tiny_model("qwen3")
    enable_tree(model)
    model.save_pretrained(tmp_path)
    assert "tree" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("asked_for", "loaded"),
    [
        ("flash_attention_2", "kernels-community/vllm-flash-attn3"),
        ("kernels-community/flash-attn2", "kernels-community/vllm-flash-attn3"),
        ("tree_varlen_2", "tree_varlen_2"),
    ],
)
def test_transformers_chooses_the_flash_kernel_of_gpt_oss(asked_for, loaded, monkeypatch):
    """And `tree_varlen_2`, not a flash kernel to its eyes, gets past that: what the docs and the recipe say."""
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda name, **options: None)
    model = tiny_model("gpt-oss")
    model.set_attn_implementation(asked_for)
    assert model.config._attn_implementation == loaded
    assert loaded in (ROOT / "docs/performance.md").read_text()
    assert loaded == "tree_varlen_2" or loaded in gpu_step.KERNELS
