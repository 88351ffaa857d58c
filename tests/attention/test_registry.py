"""The names of tree attention: which `attn_implementation` means which, and what a saved model shows of it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, modeling_utils

from benchmarks import gpu_step
from support.gpu_stand_in import H100
from support.tiny_models import tiny_model
from trl_singlepass.attention.kernel_choice import DeviceTraits, choose_torch_kernel
from trl_singlepass.attention.mask_rules import MaskRule, RuleKind
from trl_singlepass.attention.registry import TREE_ATTENTION, describe_tree_attention, tree_attention_name
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


def test_the_recipe_of_gpt_oss_says_which_kernel_runs():
    recipe = (ROOT / "recipes/gpt-oss-20b.yaml").read_text()
    assert "attn_implementation:" not in recipe
    assert tiny_model("gpt-oss", attn_implementation=None).config._attn_implementation == "eager"
    assert choose_torch_kernel(H100, torch.bfloat16, 64, MaskRule(RuleKind.WINDOW, 128)) == "varlen"
    assert "PyTorch's varlen flash kernel" in recipe


@pytest.mark.parametrize("implementation", [*TREE_ATTENTION, "kernels-community/flash-attn3"])
def test_every_attention_is_described(implementation):
    text = describe_tree_attention(implementation, tiny_model("qwen3").config, torch.device("cpu"), torch.float32)
    assert ("half precision only" in text) == (implementation not in ("sdpa", "eager", "flex_attention"))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3", "varlen for full_attention"),
        ("gpt-oss", "varlen for sliding_attention and full_attention"),
        ("llama4", "varlen for chunked_attention and full_attention"),
        ("gemma2", "flex for sliding_attention and full_attention"),
    ],
)
def test_the_description_follows_the_choice_of_kernel(family, expected, monkeypatch):
    monkeypatch.setattr(DeviceTraits, "from_device", lambda device: H100)
    config = tiny_model(family, head_dim=16).config
    half = describe_tree_attention("sdpa", config, torch.device("cuda"), torch.bfloat16)
    assert half.endswith(f"in torch.bfloat16: {expected}")
    assert "math for" in describe_tree_attention("eager", config, torch.device("cuda"), torch.float32)
    old = DeviceTraits("cuda", (7, 5), has_flash=True, has_packed_lse=True)
    monkeypatch.setattr(DeviceTraits, "from_device", lambda device: old)
    assert "7.5, not 8.0" in describe_tree_attention("sdpa", config, torch.device("cuda"), torch.bfloat16)
