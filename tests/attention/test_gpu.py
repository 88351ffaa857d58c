"""On a GPU in bfloat16: families of models, on every kernel, are at most twice as far from float64 as N-pass is."""

import pytest
import torch

from support.gpu_or_cpu import DEVICE, needs_device
from support.half_precision import assert_at_most_twice_the_error, flat
from support.sample_sets import reasoning_chat
from support.tiny_models import FAMILIES, tiny_model
from trl_singlepass.attention import TREE_ATTENTION
from trl_singlepass.attention.registry import tree_attention_name
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.reference import npass_loss_and_gradients
from trl_singlepass.reference.single_pass import single_pass_loss_and_gradients


SIZES = {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.05}
SAMPLES = reasoning_chat(turns=6)
# The last one is what transformers runs for gpt-oss under "flash_attention_2".
HUB_KERNELS = [f"kernels-community/{name}" for name in ("flash-attn2", "flash-attn3", "vllm-flash-attn3")]
WITHOUT_SOFTCAP = {"torch_varlen"}


def model_of(family, dtype=torch.bfloat16):
    own = {"query_pre_attn_scalar": 32} if family.startswith("gemma") else {}
    return tiny_model(family, dtype=dtype, **SIZES, **own)


def check(family, kernel, device, checkpointing=False):
    def gradients_of(model):
        model.config._attn_implementation_internal = kernel
        enable_tree(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return single_pass_loss_and_gradients(model, SAMPLES).gradients

    assert_at_most_twice_the_error(model_of(family), SAMPLES, device, gradients_of)


@pytest.mark.gpu
@needs_device
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", [*TREE_ATTENTION, *HUB_KERNELS])
def test_error_is_at_most_twice_that_of_npass(kernel, family, checkpointing):
    try:
        tree_attention_name(kernel)
    except ImportError as error:
        pytest.skip(str(error))
    if family == "gemma2" and kernel in WITHOUT_SOFTCAP:
        pytest.skip("refused: the kernel has no softcap")
    if kernel == "flex_attention" and DEVICE == "cpu":
        pytest.skip("trains on GPUs only")
    check(family, kernel, DEVICE, checkpointing)


@pytest.mark.parametrize("family", ["qwen3", "gpt-oss"])
def test_the_same_comparison_on_cpu(family):
    check(family, "sdpa", "cpu")


@pytest.mark.parametrize("family", ["qwen3", "gpt-oss"])  # their norms or rotary embeddings leave queries in float32
def test_autocast(family):
    """`bf16=True` with a float32 model: queries and values reach attention in different dtypes."""
    model = model_of(family, torch.float32)
    exact = flat(npass_loss_and_gradients(model, SAMPLES).gradients)
    with torch.autocast("cpu", torch.bfloat16):
        own_error = (flat(npass_loss_and_gradients(model, SAMPLES).gradients) - exact).norm()
        enable_tree(model)
        gradients = flat(single_pass_loss_and_gradients(model, SAMPLES).gradients)
    assert (gradients - exact).norm() <= 2 * own_error
