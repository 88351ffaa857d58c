"""Flash varlen kernels, emulated: calls are exact, whichever package they go to, and ordinary batches stay stock."""

import pytest
import torch
import transformers.modeling_flash_attention_utils as stock
from hypothesis import HealthCheck, given, settings

from support import fake_flash
from support.float64_comparison import CHECKPOINTING, assert_equal_to_npass, forward
from support.sample_sets import reasoning_chat, sample_sets
from support.tiny_models import CUT_OFF, FAMILIES, tiny_model
from support.tree_masks import mask_of, tree_of
from support.varlen_reference import ReferenceKernel, switch
from trl_singlepass.attention import flash, registry, varlen_plan
from trl_singlepass.engine.enable import enable_tree


pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


@pytest.fixture
def kernel(monkeypatch):
    """A kernel for CPU, whatever `attn_implementation` says."""
    kernel = ReferenceKernel()
    install(monkeypatch, kernel)
    return kernel


def install(monkeypatch, kernel):
    for module in (flash, registry):
        monkeypatch.setattr(module, "flash_kernel", lambda implementation: kernel)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_equals_npass(family, checkpointing, kernel):
    overrides = CUT_OFF.get(family, {}) if checkpointing == "reentrant" else {}
    model, prepare = tiny_model(family, **overrides), CHECKPOINTING[checkpointing]

    def to_flash(model):
        switch(model)
        if prepare is not None:
            prepare(model)

    assert_equal_to_npass(model, [reasoning_chat()], prepare=to_flash)
    assert model.config._attn_implementation == "tree_varlen_2"
    assert kernel.calls


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt-oss", "llama4"])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=sample_sets())
def test_random_trees(family, samples, kernel):
    assert_equal_to_npass(tiny_model(family), [samples], prepare=switch)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", ["gemma3", "gpt-oss", "llama4"])
def test_calls_split_by_memory_are_exact(family, kernel, monkeypatch):
    monkeypatch.setattr(varlen_plan, "KEYS_PER_CALL", 1)
    assert_equal_to_npass(tiny_model(family), [reasoning_chat(6), reasoning_chat(2, seed=1)], prepare=switch)
    assert len(set(map(id, kernel.calls))) > 2


@pytest.mark.parametrize("route", ["keyword", "environment", "torch", None])
def test_deterministic_reaches_the_kernel(route, monkeypatch, kernel):
    seen, backward = [], kernel.backward
    kernel.backward = lambda *args, deterministic: seen.append(deterministic) or backward(*args, deterministic=True)
    model, mask = tiny_model("qwen3"), mask_of(tree_of([reasoning_chat()]), "causal", 0)
    switch(model)
    length = mask.tree.plan.length
    query, key, value = (torch.randn(1, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2))
    if route == "environment":
        monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")
    torch.use_deterministic_algorithms(route == "torch")
    attend = flash.varlen_forward("flash_attention_2")
    gradients = []
    for options in ({"deterministic": True} if route == "keyword" else {}, {"deterministic": False}):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        attend(model.model.layers[0].self_attn, *leaves, mask, **options)[0].sin().sum().backward()
        gradients.append([x.grad for x in leaves])
    torch.use_deterministic_algorithms(False)
    assert seen == [route is not None, False]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_hub_kernels_are_registered_when_asked_for(kernel):
    model = tiny_model("qwen3")
    switch(model, "kernels-community/flash-attn3")
    name = model.config._attn_implementation
    assert name.startswith("tree_varlen_")
    assert not {"flash", "/", "sdpa"} & set(name.split("_"))
    assert "flash" not in name
    enable_tree(model)  # a second trainer on the same model
    assert model.config._attn_implementation == name


def test_refusals(monkeypatch):
    install(monkeypatch, ReferenceKernel(has_softcap=False))
    model = tiny_model("gemma2")
    switch(model, "torch_varlen")
    with pytest.raises(ValueError, match=r"softcap 50.0\), which the kernel of 'torch_varlen' cannot do"):
        forward(model, [reasoning_chat()])
    monkeypatch.setattr(ReferenceKernel, "dtypes", (torch.bfloat16,))
    model = tiny_model("qwen3", dtype=torch.float32)
    switch(model)
    with pytest.raises(ValueError, match="computes in half precision"):
        forward(model, [reasoning_chat()])
    monkeypatch.setattr(ReferenceKernel, "dtypes", (torch.float32,))
    monkeypatch.setattr(ReferenceKernel, "max_head_dim", 4)
    with pytest.raises(ValueError, match="heads of size 8, and the kernel of 'flash_attention_2' takes up to 4"):
        forward(model, [reasoning_chat()])


@pytest.mark.parametrize("family", ["qwen3", "mistral-sliding", "gemma2"])
@pytest.mark.parametrize("batch", ["padded", "packed", "full", "generation"])
def test_ordinary_batches_run_the_stock_function(family, batch, kernel, monkeypatch):
    loaded = []

    def lazy_imports(implementation, *args, **kwargs):
        loaded.append(implementation)
        return fake_flash.func, fake_flash.varlen_func, None, stock._pad_input, stock._unpad_input

    monkeypatch.setattr(stock, "_lazy_imports", lazy_imports)
    monkeypatch.setattr(stock, "_loaded_implementation", None)
    model, reference = tiny_model(family).eval(), tiny_model(family).eval()
    switch(model)
    input_ids = torch.randint(5, 90, (2, 11))
    inputs = {"input_ids": input_ids}
    if batch == "padded":
        inputs["attention_mask"] = torch.tensor([[1] * 8 + [0] * 3, [1] * 11])
    if batch == "packed":
        inputs = {"input_ids": input_ids[:1], "position_ids": torch.tensor([[*range(4), *range(7)]])}
    if batch == "generation":
        options = {"max_new_tokens": 4, "do_sample": False, "use_cache": False}
        assert torch.equal(model.generate(input_ids, **options), reference.generate(input_ids, **options))
    else:
        logits, expected = (m(**inputs, use_cache=False).logits for m in (model, reference))
        kept = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])) > 0
        torch.testing.assert_close(logits[kept], expected[kept], atol=1e-5, rtol=0)
    assert set(loaded) == {"flash_attention_2"}
    assert not kernel.calls
