"""The measured check: right models pass, planted layers are found and named, and the model is left as it was."""

import copy

import numpy as np
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model

from support.planted_layers import PLANTED, plant, qwen3_model
from support.sample_sets import reasoning_chat
from support.tiny_models import FAMILIES, HYBRIDS, model_of_type
from support.tiny_models import tiny_model as family_model
from support.tree_checks import AUTOCAST, PRECISIONS, TEXT, checked
from trl_singlepass import check_tree, enable_tree
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.engine.check.tree_check import NEWEST_TRIED, TreeCheck
from trl_singlepass.engine.enable import UnsupportedModelError
from trl_singlepass.engine.model_call import takes_trees
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row
from versions.report import read_results


def state_of(model):
    parameters = {name: (tensor, tensor.clone(), tensor.grad) for name, tensor in model.named_parameters()}
    return parameters, [module.training for module in model.modules()], torch.get_rng_state()


# Right models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_right_models_pass(family, precision):
    report = checked(family_model(family), precision)
    assert report.ok, report.reason
    assert report.leak == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("family", ["qwen3_5_text", "bamba", "lfm2", "jamba", "deepseek_v32", "recurrent_gemma"])
def test_hybrids_pass(family, precision):
    assert family in HYBRIDS
    report = checked(model_of_type(family), precision)
    assert report.ok, report.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_router_at_rounding_distance_is_no_failure(dtype):
    """All experts of a router are within a rounding of each other, so that two forwards pick different ones."""
    model = family_model("qwen3-moe", dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            noise = torch.finfo(dtype).eps * torch.randn(parameter.shape)
            parameter.data = (parameter.data[:1] * (1 + noise)).to(dtype)
    report = checked(model)
    assert report.ok, report.reason
    assert report.noise > 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        # Attention is nearly uniform; a norm would undo a change of all channels.
        ("gemma2", {"initializer_range": 0.02}),
        # Routers nearly tie, and in one of two measurements, a tree picks another expert.
        ("gpt_oss", {"initializer_range": 0.05, "hidden_size": 64, "num_hidden_layers": 6, "layer_types": None}),
    ],
)
def test_rounding_under_autocast_is_no_failure(family, sizes):
    report = checked(model_of_type(family, **sizes), AUTOCAST, np.random.default_rng(0).integers(5, 90, 200))
    assert report.ok, report.reason


# Planted layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "strength"),
    [
        *((precision, 1.0) for precision in PRECISIONS),
        *(pytest.param(precision, 0.1, marks=pytest.mark.slow) for precision in (torch.bfloat16, AUTOCAST)),
    ],
)
@pytest.mark.parametrize("name", PLANTED)
def test_planted_layers_are_found(name, precision, strength):
    model, place = plant(qwen3_model(), name, strength)
    report = checked(model, precision)
    assert not report.ok
    if strength == 1:
        assert report.where.startswith(f"{place} ({name})")


@pytest.mark.parametrize("name", PLANTED)
def test_planted_layers_are_found_without_gradients(name):
    """As under engines that give none."""
    model, _ = plant(qwen3_model(), name)
    enable_tree(model, check=False)
    check = TreeCheck(model, DataCollatorForSinglePass(0))
    check.model.gives_gradients = False
    report = check.run(TEXT)
    assert report.leak is None
    assert not report.ok
    right = qwen3_model()
    enable_tree(right)
    check = TreeCheck(right, DataCollatorForSinglePass(0))
    check.model.gives_gradients = False
    assert check.run(TEXT).ok


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")
def test_adapters_that_start_at_zero_are_measured_with_an_effect():
    model = get_peft_model(qwen3_model(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    adapted = model.base_model.model.model.layers[1].mlp.down_proj
    shifted = adapted.lora_B["default"].forward
    assert checked(model).ok
    adapted.lora_B["default"].forward = lambda x: shifted(torch.roll(x, 1, dims=1))
    report = checked(model)
    assert not report.ok
    assert "lora_B" in report.where
    assert not adapted.lora_B["default"].weight.any()


# The public function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "ZeroGate"])
@pytest.mark.parametrize("enabled", [False, True])
def test_the_model_is_left_as_it_was(tokenizer, name, enabled):
    model = qwen3_model(vocab_size=len(tokenizer))
    model = model if name is None else plant(model, name)[0]
    model.train()
    model.model.layers[0].eval()
    if enabled:
        enable_tree(model, check=False)
    parameters, modes, random = state_of(model)
    attention = model.config._attn_implementation
    assert check_tree(model, tokenizer).ok == (name is None)
    for tensor, value, grad in parameters.values():
        assert torch.equal(tensor, value)
        assert tensor.grad is grad
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert model.config._attn_implementation == attention
    assert takes_trees(model) == enabled


def test_a_batch_gives_the_tokens_of_the_row():
    model = qwen3_model()
    batch = DataCollatorForSinglePass(0)([Row.from_tree(PrefixTree.from_samples(reasoning_chat())).columns()])
    report = check_tree(copy.deepcopy(model), batch)
    assert report.ok
    assert "tree equals separate samples" in str(report)


@pytest.mark.parametrize("name", PLANTED)
def test_a_model_is_not_enabled_unless_it_was_measured(name):
    """Without a tokenizer or data; what is refused is left as it was."""
    model, _ = plant(qwen3_model(), name)
    with pytest.raises(UnsupportedModelError, match=name):
        enable_tree(model)
    assert not takes_trees(model)
    assert model.config._attn_implementation == "sdpa"
    enable_tree(model, check=False)
    assert takes_trees(model)


def test_a_refusal_on_a_newer_release_says_so_first(monkeypatch):
    """There, the layer may be right and what runs it on a tree behind."""
    model, _ = plant(qwen3_model(), "TokenShift")
    monkeypatch.setitem(NEWEST_TRIED, "transformers", "5.1")
    with pytest.raises(UnsupportedModelError, match=r"^transformers 5[^ ]* has not been tried") as error:
        enable_tree(model)
    assert "take out" not in str(error.value)


def test_the_newest_releases_are_those_that_were_recorded():
    recorded = [one["versions"] for one in read_results() if not one["failed"]]
    for library, newest in NEWEST_TRIED.items():
        assert Version(newest).release >= max(Version(one[library]).release[:2] for one in recorded)
