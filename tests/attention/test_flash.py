"""Flash varlen kernels, emulated: calls are exact, whichever package they go to, and ordinary batches stay stock."""

import itertools
import sys

import pytest
import torch
import transformers.modeling_flash_attention_utils as stock
from hypothesis import HealthCheck, given, settings

from support import fake_flash
from support.float64_comparison import CHECKPOINTING, assert_equal_to_npass, forward
from support.sample_sets import reasoning_chat, sample_sets
from support.tiny_families import FAMILIES, MIXTURES, tiny_model
from support.tree_masks import mask_of, tree_masks, tree_of
from support.varlen_reference import ReferenceKernel
from trl_singlepass.attention import flash, registry, varlen_kernels, varlen_plan
from trl_singlepass.attention.sdpa import tree_attention
from trl_singlepass.attention.varlen_plan import varlen_calls
from trl_singlepass.training.model import enable_tree


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


def switch(model, implementation="flash_attention_2"):
    """What loading with `attn_implementation` does where the package is installed."""
    model.set_attn_implementation("eager")
    model.config._attn_implementation_internal = implementation
    enable_tree(model)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_equals_npass(family, checkpointing, kernel):
    overrides = {"output_router_logits": False} if checkpointing == "reentrant" and family in MIXTURES else {}
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


def sequences_of(mask):
    """Positions of the queries and the keys of every sequence that a kernel is given."""
    length = mask.tree.plan.length
    for call in varlen_calls(mask):
        queries, keys = torch.arange(call.start, call.end), torch.arange(length)
        keys = keys if call.key_index is None else call.key_index.long()
        for i in range(len(call.cu_seqlens_q) - 1):
            yield (
                call,
                queries[call.cu_seqlens_q[i] : call.cu_seqlens_q[i + 1]],
                keys[call.cu_seqlens_k[i] : call.cu_seqlens_k[i + 1]],
            )


@settings(max_examples=150)
@given(mask=tree_masks())
def test_calls_see_exactly_the_mask(mask):
    seen = torch.zeros_like(mask.dense()[0, 0])
    for call, queries, keys in sequences_of(mask):
        behind = torch.arange(len(queries))[:, None] + len(keys) - len(queries) - torch.arange(len(keys))
        visible = (behind >= 0) & (behind < (call.window or len(seen)))
        seen[queries[:, None], keys] |= visible
        assert bool(visible.any(1).all())
    assert torch.equal(seen, mask.dense()[0, 0])


@settings(max_examples=100)
@given(mask=tree_masks())
def test_gathered_paths_are_contiguous_in_depth(mask):
    """Which is why a kernel's window, that counts keys back from the query, is a window by depth."""
    depth = mask.tree.depth[0]
    for _, queries, keys in sequences_of(mask):
        assert torch.equal(depth[keys], torch.arange(len(keys)) + depth[keys[0]])
        assert torch.equal(keys[len(keys) - len(queries) :], queries)


@settings(max_examples=50)
@given(mask=tree_masks(("window", "chunk")))
def test_local_layers_gather_no_more_than_they_can_see(mask):
    size = mask.local_size
    for _, queries, keys in sequences_of(mask):
        assert len(keys) <= len(queries) + size - 1


def test_number_of_calls_does_not_grow_with_branches():
    calls = {turns: len(varlen_calls(mask_of(tree_of([reasoning_chat(turns)]), "causal", 0))) for turns in (1, 3, 9)}
    assert calls == {1: 1, 3: 1, 9: 1}


def test_a_long_shared_history_is_gathered_in_parts():
    mask = mask_of(tree_of([reasoning_chat(80)]), "causal", 0)
    calls, length = varlen_calls(mask), mask.tree.plan.length
    keys = [len(call.key_index) for call in calls]
    assert 1 < len(calls) <= sum(keys) / (4 * length) * 2 + 1
    assert max(keys) <= 4 * length


def test_plain_text_is_not_gathered():
    mask = mask_of(tree_of([reasoning_chat(1), reasoning_chat(1, seed=1)]), "causal", 0)
    (call,) = varlen_calls(mask)
    assert call.key_index is None


def test_gathered_keys_are_not_kept_for_backward(kernel):
    mask, saved = mask_of(tree_of([reasoning_chat(8)]), "causal", 0), []
    length = mask.tree.plan.length
    query, key, value = (torch.randn(1, heads, length, 8, requires_grad=True) for heads in (4, 2, 2))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        flash.varlen_tree_attention(query, key, value, mask, kernel, 1.0)
    assert len(mask.derived(varlen_calls)[0].key_index) > 2 * length
    assert max(x.numel() for x in saved) <= query.numel()


PACKAGES = {"flash2": fake_flash.flash2, "flash3": fake_flash.flash3, "hub_flash3": fake_flash.hub_flash3}


def kernel_from(monkeypatch, package):
    """The kernel that is made of a package's module, as it is found through transformers."""
    module = PACKAGES[package]()
    monkeypatch.setitem(sys.modules, "fake_package", module)
    module.__name__ = "fake_package"
    found = (None, type("F", (), {"__module__": "fake_package"})())
    monkeypatch.setattr(varlen_kernels, "lazy_import_flash_attention", lambda name: (found, None))
    return varlen_kernels.flash_kernel.__wrapped__("any/flash")


@pytest.mark.parametrize("kind", ["causal", "window", "chunk"])
@pytest.mark.parametrize(("package", "softcap"), [("torch", None), *itertools.product(PACKAGES, [None, 3.0])])
def test_every_package_is_called_right(package, kind, softcap, monkeypatch):
    library = fake_flash.torch_library() if package == "torch" else None
    kernel = varlen_kernels.TorchFlash() if package == "torch" else kernel_from(monkeypatch, package)
    mask = mask_of(tree_of([reasoning_chat()]), kind, 5)
    length = mask.tree.plan.length
    query, key, value = (torch.randn(1, heads, length, 6, dtype=torch.float64) for heads in (4, 2, 2))
    sinks = torch.randn(4, dtype=torch.float64)
    results = []
    for attend in (
        lambda *x: flash.varlen_tree_attention(*x[:3], mask, kernel, 0.3, softcap, x[3]).transpose(1, 2),
        lambda *x: tree_attention(*x[:3], mask, 0.3, softcap, x[3]),
    ):
        leaves = [x.clone().requires_grad_() for x in (query, key, value, sinks)]
        out = attend(*leaves)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    for computed, expected in zip(*results, strict=True):
        torch.testing.assert_close(computed, expected, atol=1e-12, rtol=0)
    if library is not None:
        library._destroy()


@pytest.mark.parametrize("route", ["keyword", "environment", "torch", None])
def test_deterministic_reaches_the_kernel(route, monkeypatch, kernel):
    seen, backward = [], kernel.backward
    kernel.backward = lambda *args: seen.append(args[-1]) or backward(*args)
    model, mask = tiny_model("qwen3"), mask_of(tree_of([reasoning_chat()]), "causal", 0)
    switch(model)
    length = mask.tree.plan.length
    query, key, value = (torch.randn(1, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2))
    if route == "environment":
        monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")
    torch.use_deterministic_algorithms(route == "torch")
    attend = flash.varlen_forward_of("flash_attention_2")
    gradients = []
    for options in ({"deterministic": True} if route == "keyword" else {}, {"deterministic": False}):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        attend(model.model.layers[0].self_attn, *leaves, mask, **options)[0].sin().sum().backward()
        gradients.append([x.grad for x in leaves])
    torch.use_deterministic_algorithms(False)
    assert seen == [route is not None, False]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("flash_attention_2", r"Install flash-attn \(2.7 or newer\)"),
        ("flash_attention_3", "Install flash-attn"),
        ("kernels-community/flash-attn2", "kernels for a kernel of the Hub"),
        ("torch_varlen", "for CUDA, and there is none"),
    ],
)
def test_a_missing_package_is_named(implementation, message):
    if torch.cuda.is_available():
        pytest.skip("may be installed")
    with pytest.raises(ImportError, match=message):
        switch(tiny_model("qwen3"), implementation)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"attn_implementation='paged\|eager'"):
        switch(tiny_model("qwen3"), "paged|eager")


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
    with pytest.raises(ValueError, match="neither causal nor a sliding window nor a chunk"):
        varlen_calls(mask_of(tree_of([reasoning_chat()]), "other", 4))
    with pytest.raises(ImportError, match="log-sum-exp of shape"):
        varlen_kernels._output_and_lse((None, torch.zeros(1, 4, 9)), torch.zeros(9, 4, 8))


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
