"""The names of tree attention: which `attn_implementation` means which, and what a saved model shows of it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, modeling_utils

from benchmarks import gpu_step
from support.float64_comparison import forward
from support.sample_sets import reasoning_chat
from support.tiny_models import tiny_model
from trl_singlepass.attention.registry import tree_attention_name
from trl_singlepass.engine.enable import enable_tree


IDS = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("implementation", "name"),
    [("sdpa", "tree_torch"), ("eager", "tree_eager"), ("flex_attention", "tree_flex"), ("tree_flex", "tree_flex")],
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


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_a_tree_the_code_of_a_model_sees_its_own_implementation(implementation, monkeypatch):
    model = tiny_model("qwen3", attn_implementation=implementation, dtype=torch.float32)
    seen, layer = [], model.model.layers[1].mlp
    run = layer.forward

    def noting(states):
        seen.append(model.config._attn_implementation)
        return run(states)

    monkeypatch.setattr(layer, "forward", noting)
    enable_tree(model)
    seen.clear()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    name = tree_attention_name(implementation)
    on_text, on_tree = model(IDS).logits, forward(model, [reasoning_chat()])[0].logits
    assert seen == [implementation, name]
    (on_text.sum() + on_tree.sum()).backward()  # layers run again: each as it ran before
    assert sorted(seen[2:]) == sorted([implementation, name])
    assert model.config._attn_implementation == name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_enabled_gemma_4_reads_and_writes_text_as_before(implementation):
    model = tiny_model("gemma4", attn_implementation=implementation).eval()

    def outputs():
        logits = [model(IDS, logits_to_keep=number).logits for number in (0, 1, 5)]
        caches = ({}, {"cache_implementation": "static", "disable_compile": True})
        return logits + [model.generate(IDS, max_new_tokens=8, do_sample=False, **cache) for cache in caches]

    with torch.no_grad():
        expected = outputs()
        enable_tree(model)
        for found, value in zip(outputs(), expected, strict=True):
            assert torch.equal(found, value)


def test_on_a_tree_gemma_4_cuts_no_mask():
    model = tiny_model("gemma4")
    enable_tree(model)
    with pytest.raises(ValueError, match="logits_to_keep"):
        forward(model, [reasoning_chat()], logits_to_keep=5)


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
