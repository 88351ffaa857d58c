"""The names of tree attention: which `attn_implementation` means which, and what a saved model shows of it."""

import pytest
from transformers import AutoModelForCausalLM

from support.tiny_families import tiny_model
from trl_singlepass.attention.registry import tree_attention_name
from trl_singlepass.training.model import enable_tree


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
