"""FlexAttention: the block mask equals the dense one, one compilation serves all rows, and training equals N-pass."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.nn.attention import flex_attention as torch_flex

from support.float64_comparison import CHECKPOINTING, assert_equal_to_npass, forward
from support.gpu_stand_in import A100, B200, H100, L4, RTX5090
from support.sample_sets import reasoning_chat, sample_sets
from support.tiny_models import CUT_OFF, FAMILIES, tiny_model
from support.tree_masks import mask_of, on_meta, random_inputs, tree_of
from trl_singlepass.attention import flex
from trl_singlepass.attention.block_mask import build_block_mask
from trl_singlepass.attention.kernel_choice import DeviceTraits
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.reference import leak_probe


pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    # Uncompiled FlexAttention is traced by dynamo, which looks at every attribute.
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture
def differentiable(monkeypatch):
    """FlexAttention uncompiled and with a backward pass on CPU, which PyTorch has but does not let through."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_WITHOUT_BACKWARD", set())
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: torch_flex.flex_attention)


@pytest.fixture
def captured(differentiable, monkeypatch):
    """The same, but captured and differentiated as on a GPU, to run op by op instead of as generated code."""
    torch.compiler.reset()
    compiled = torch.compile(torch_flex.flex_attention, dynamic=True, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: compiled)
    yield
    torch.compiler.reset()


def flex_model(family, **overrides):
    """A model under tree attention by FlexAttention; transformers refuses the stock name for some families."""
    model = tiny_model(family, attn_implementation="tree_flex", **overrides)
    enable_tree(model)
    return model


# Not captured, PyTorch 2.13 returns garbage as gradients of a softcap that is traced under checkpointing's hooks.
TRAINING = [pair for pair in itertools.product(FAMILIES, CHECKPOINTING) if pair != ("gemma2", "non-reentrant")]


@pytest.mark.usefixtures("float64", "differentiable")
@pytest.mark.parametrize(("family", "checkpointing"), TRAINING)
def test_training_equals_npass(family, checkpointing):
    overrides = CUT_OFF.get(family, {}) if checkpointing == "reentrant" else {}
    model, prepare = tiny_model(family, **overrides), CHECKPOINTING[checkpointing]

    def to_flex(model):
        model.set_attn_implementation("tree_flex")
        if prepare is not None:
            prepare(model)

    assert_equal_to_npass(model, [reasoning_chat()], prepare=to_flex)
    assert model.config._attn_implementation == "tree_flex"


@pytest.mark.slow
@pytest.mark.usefixtures("float64", "captured")
@pytest.mark.parametrize("family", ["llama", "gpt-oss", "gemma2"])
def test_training_equals_npass_captured(family):
    def to_flex(model):
        model.set_attn_implementation("tree_flex")
        CHECKPOINTING["non-reentrant"](model)

    assert_equal_to_npass(tiny_model(family), [reasoning_chat(10)], prepare=to_flex)


@pytest.mark.usefixtures("float64", "differentiable")
@pytest.mark.parametrize("family", ["gemma3", "gpt-oss"])
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=sample_sets())
def test_random_trees(family, samples):
    def to_flex(model):
        model.set_attn_implementation("tree_flex")

    assert_equal_to_npass(tiny_model(family), [samples], prepare=to_flex)


@pytest.mark.parametrize(("family", "mask_types"), [("qwen3", 1), ("gemma3", 2), ("llama4", 2)])
def test_layers_of_a_mask_type_share_one_block_mask(family, mask_types, differentiable, monkeypatch):
    built = []

    def counted(*args):
        built.append(args)
        return build_block_mask(*args)

    monkeypatch.setattr(flex, "build_block_mask", counted)
    layers = ["sliding_attention", "full_attention"] * 3 if family == "gemma3" else None
    layers = ["chunked_attention", "full_attention"] * 3 if family == "llama4" else layers
    overrides = {"no_rope_layers": [1, 0] * 3} if family == "llama4" else {}
    model = flex_model(family, num_hidden_layers=6, layer_types=layers, dtype=torch.float32, **overrides)
    forward(model, [reasoning_chat()])
    assert len(built) == mask_types


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the C++ compiler and of PyTorch's own code
@pytest.mark.parametrize(("family", "mask_types"), [("qwen3", 1), ("gemma2", 2), ("llama4", 2)])
def test_one_compilation_serves_rows_of_any_length(family, mask_types):
    torch.compiler.reset()
    flex.compiled_flex_attention.cache_clear()
    sizes = {"dtype": torch.float32, "hidden_size": 64, "head_dim": 16}
    model, reference = flex_model(family, **sizes), tiny_model(family, attn_implementation="eager", **sizes)
    enable_tree(reference)
    graphs, before = torch._dynamo.utils.counters["stats"], torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for turns in (9, 12, 20, 7, 30, 13):
        with torch.no_grad():
            logits, expected = (forward(m, [reasoning_chat(turns)])[0].logits for m in (model, reference))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert graphs["unique_graphs"] - before == mask_types
    torch.compiler.reset()


def test_training_on_cpu_is_refused():
    model = flex_model("qwen3", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"no backward pass there.*attn_implementation='sdpa'"):
        forward(model, [reasoning_chat()])


@pytest.mark.usefixtures("differentiable")
@pytest.mark.parametrize("route", ["keyword", "config"])
def test_kernel_options_reach_the_kernel(route, monkeypatch):
    seen = []

    def recorded(*args, kernel_options=None, **kwargs):
        seen.append(kernel_options)
        return torch_flex.flex_attention(*args, **kwargs)

    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: recorded)
    model, options = flex_model("qwen3", dtype=torch.float32), {"BACKEND": "TRITON"}
    layer, tree = model.model.layers[0].self_attn, tree_of([reasoning_chat()])
    if route == "config":
        model.config.kernel_options = options
    length = tree.plan.length
    query, key = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8)
    keywords = {"kernel_options": options} if route == "keyword" else {}
    flex.flex_forward(layer, query, key, key, mask_of(tree, "causal", 0), **keywords)
    assert seen == [options]


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (None, {"FORCE_USE_FLEX_ATTENTION": True}),
        ({"BLOCK_M": 64}, {"FORCE_USE_FLEX_ATTENTION": True, "BLOCK_M": 64}),
        ({"BACKEND": "TRITON"}, {"BACKEND": "TRITON"}),  # PyTorch takes one of the two
    ],
)
def test_short_rows_stay_off_the_decoding_kernel(given, passed, monkeypatch):
    """Which finds no block size for grouped heads. Meta tensors stand for a GPU."""
    seen = []
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: lambda q, k, v, **options: seen.append(options) or q)
    tree = on_meta(tree_of([reasoning_chat()]))
    flex.flex_tree_attention(on_meta(random_inputs(tree, heads=8)), mask_of(tree, "causal", 0), given)
    assert seen[0]["kernel_options"] == passed


@pytest.mark.parametrize("gpu", [A100, L4, H100, B200, RTX5090])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_large_heads_get_small_blocks_where_shared_memory_is_small(head_dim, gpu, monkeypatch):
    seen = []
    monkeypatch.setattr(DeviceTraits, "from_device", classmethod(lambda cls, device: gpu))
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: lambda q, k, v, **options: seen.append(options) or q)
    tree = on_meta(tree_of([reasoning_chat()]))
    inputs, mask = on_meta(random_inputs(tree, head_dim=head_dim)), mask_of(tree, "causal", 0)
    for options in (None, {"num_stages": 2}):
        flex.flex_tree_attention(inputs, mask, options)
    stages = [options["kernel_options"].get("num_stages") for options in seen]
    assert stages == [1 if gpu in (L4, RTX5090) and head_dim > 128 else None, 2]


def test_flash_attention_4_cannot_train_sinks():
    model, tree = flex_model("gpt-oss", dtype=torch.float32), on_meta(tree_of([reasoning_chat()]))
    inputs = on_meta(random_inputs(tree, sinks=True))
    with pytest.raises(ValueError, match=r"'FLASH'\} cannot train a model with attention sinks.*Leave BACKEND out"):
        flex.flex_forward(
            model.model.layers[0].self_attn, inputs.query, inputs.key, inputs.value, mask_of(tree, "causal", 0),
            s_aux=inputs.sinks, kernel_options={"BACKEND": "FLASH"},
        )  # fmt: skip


@pytest.mark.usefixtures("captured")
def test_verify_probes_leaks_of_captured_flex_attention():
    """Its backward donates what the forward saved, so a graph serves one backward only."""
    model = flex_model("qwen3", dtype=torch.float32).eval()
    assert leak_probe(model, reasoning_chat()).ok


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ordinary_batches_are_exact():
    model, reference = flex_model("qwen3", dtype=torch.float32), tiny_model("qwen3", dtype=torch.float32)
    input_ids = torch.randint(5, 90, (2, 9))
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    with torch.no_grad():
        logits, expected = (m(input_ids, attention_mask=attention_mask).logits for m in (model, reference))
    torch.testing.assert_close(logits[attention_mask > 0], expected[attention_mask > 0], atol=1e-5, rtol=0)
