"""On a GPU in bfloat16: rows, waves and hybrids, on every kernel, are at most twice as far from float64 as N-pass."""

import copy

import pytest
import torch

from support.gpu_or_cpu import DEVICE, needs_device
from support.row_training import batch_of, plan_of, train_in_waves
from support.sample_sets import reasoning_chat
from support.tiny_models import FAMILIES, model_of_type, tiny_model, without_router_loss
from support.trainers import needs_cached_states
from trl_singlepass.attention import TREE_ATTENTION
from trl_singlepass.attention.registry import tree_attention_name
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.recurrent import scan_check
from trl_singlepass.recurrent.measurement import path_dependent_layers
from trl_singlepass.reference import npass_loss_and_gradients
from trl_singlepass.reference.single_pass import single_pass_loss_and_gradients
from trl_singlepass.reference.verification import ForcedFloat64


SIZES = {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.05, "dtype": torch.bfloat16}
SAMPLES = reasoning_chat(turns=6)
# The last one is what transformers runs for gpt-oss under "flash_attention_2".
HUB_KERNELS = [f"kernels-community/{name}" for name in ("flash-attn2", "flash-attn3", "vllm-flash-attn3")]
IN_WAVES = ["sdpa", "torch_varlen", "flash_attention_2", "flash_attention_3", HUB_KERNELS[-1]]
# Kernels multiply blocks of 16 at least.
DELTA = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
HYBRIDS = {"qwen3_5_text": DELTA, "qwen3_next": DELTA, "bamba": {}, "lfm2": {}, "jamba": {}, "kimi_linear": {}}


def flat(gradients):
    """Return gradients by name as one vector in float64 on the CPU."""
    return torch.cat([gradient.double().flatten().cpu() for gradient in gradients.values()])


def assert_at_most_twice_the_error(model, samples, device, gradients_of):
    """
    Assert that gradients of a single pass are at most twice as far from float64 as those of N-pass on the device.

    The model is in bfloat16, on the CPU; `gradients_of` computes them by name on a model on the device.
    """
    with ForcedFloat64():
        exact = flat(npass_loss_and_gradients(copy.deepcopy(model).double(), samples).gradients)
    npass, ours = copy.deepcopy(model).to(device), copy.deepcopy(model).to(device)
    allowed = float((flat(npass_loss_and_gradients(npass, samples).gradients) - exact).norm())
    assert float((flat(gradients_of(ours)) - exact).norm()) <= 2 * allowed
    assert allowed <= 0.2 * float(exact.norm()), "N-pass itself is far off, so that the comparison says little"


def family_model(make, family):
    own = {"query_pre_attn_scalar": 32} if family.startswith("gemma") else {}
    return make(family, **SIZES, **own)


def enable(model, kernel, checkpointing):
    model.config._attn_implementation_internal = kernel
    enable_tree(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def check_rows(family, kernel, device, checkpointing=False):
    def gradients_of(model):
        enable(model, kernel, checkpointing)
        return single_pass_loss_and_gradients(model, SAMPLES).gradients

    assert_at_most_twice_the_error(family_model(tiny_model, family), SAMPLES, device, gradients_of)


def check_waves(family, kernel, device, wave_tokens, offload=False, checkpointing=False):
    def gradients_of(model):
        enable(model, kernel, checkpointing)
        batch = batch_of([SAMPLES])
        batch = {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()}
        train_in_waves(model, batch, plan_of(batch, wave_tokens), offload)
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    assert_at_most_twice_the_error(family_model(without_router_loss, family), SAMPLES, device, gradients_of)


@pytest.fixture
def kernel(request):
    try:
        tree_attention_name(request.param)
    except ImportError as error:
        pytest.skip(str(error))
    return request.param


@pytest.mark.gpu
@needs_device
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", [*TREE_ATTENTION, *HUB_KERNELS], indirect=True)
def test_rows(kernel, family, checkpointing):
    if (family, kernel) == ("gemma2", "torch_varlen"):
        pytest.skip("refused: the kernel has no softcap")
    if kernel == "flex_attention" and DEVICE == "cpu":
        pytest.skip("trains on GPUs only")
    check_rows(family, kernel, DEVICE, checkpointing)


@pytest.mark.gpu
@needs_device
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "offloaded"])
@pytest.mark.parametrize("wave_tokens", [30, 100])
@pytest.mark.parametrize("family", ["qwen3", "mistral-sliding", "gpt-oss", "gemma3", "llama4"])
@pytest.mark.parametrize("kernel", IN_WAVES, indirect=True)
def test_waves(kernel, family, wave_tokens, offload):
    check_waves(family, kernel, DEVICE, wave_tokens, offload, checkpointing=wave_tokens == 100)


@needs_cached_states
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "device"),
    [
        ("qwen3_5_text", "cpu"),
        ("lfm2", "cpu"),
        *(pytest.param(name, DEVICE, marks=[pytest.mark.gpu, needs_device]) for name in HYBRIDS),
    ],
)
def test_hybrids(model_type, device):
    """On fast kernels, compared with PyTorch's code."""
    torch.manual_seed(0)
    model = model_of_type(model_type, **HYBRIDS[model_type], initializer_range=0.05).bfloat16()
    assert list(path_dependent_layers(model))

    def gradients_of(model):
        enable_tree(model)
        return single_pass_loss_and_gradients(model, samples).gradients

    samples = reasoning_chat(turns=4)
    assert_at_most_twice_the_error(model, samples, device, gradients_of)


@pytest.mark.gpu
@needs_device
def test_the_scan_of_this_machine_is_right():
    """What the first row of a training run checks, for the shape of released models."""
    fla = pytest.importorskip("fla.ops.gated_delta_rule", reason="needs flash-linear-attention")
    sizes = scan_check.ScanSizes(16, 32, 128, 128)
    scan_check.compare_scan(fla.chunk_gated_delta_rule, sizes, torch.device(DEVICE), torch.bfloat16)


@pytest.mark.parametrize("family", ["qwen3", "gpt-oss"])
def test_the_same_comparisons_on_cpu(family):
    check_rows(family, "sdpa", "cpu")
    check_waves(family, "sdpa", "cpu", 30)


@pytest.mark.parametrize("family", ["qwen3", "gpt-oss"])  # their norms or rotary embeddings leave queries in float32
def test_autocast(family):
    """`bf16=True` with a float32 model: queries and values reach attention in different dtypes."""
    model = tiny_model(family, **{**SIZES, "dtype": torch.float32})
    exact = flat(npass_loss_and_gradients(model, SAMPLES).gradients)
    with torch.autocast("cpu", torch.bfloat16):
        own_error = (flat(npass_loss_and_gradients(model, SAMPLES).gradients) - exact).norm()
        enable_tree(model)
        gradients = flat(single_pass_loss_and_gradients(model, SAMPLES).gradients)
    assert (gradients - exact).norm() <= 2 * own_error
