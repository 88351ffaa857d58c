"""On a GPU in bfloat16: a row in waves is at most twice as far from float64 as N-pass is, offloaded or not."""

import pytest
import torch

from support.gpu_or_cpu import DEVICE, needs_device
from support.half_precision import assert_at_most_twice_the_error
from support.sample_sets import reasoning_chat
from support.tiny_models import tiny_model
from support.wave_training import batch_of, plan_of, train_in_waves
from trl_singlepass.attention.registry import tree_attention_name
from trl_singlepass.engine.enable import enable_tree


SIZES = {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.05}
FAMILIES = ["qwen3", "mistral-sliding", "gpt-oss", "gemma3", "llama4"]
SAMPLES = reasoning_chat(turns=6)


KERNELS = ["sdpa", "torch_varlen", "flash_attention_2", "flash_attention_3", "kernels-community/vllm-flash-attn3"]


def check(family, device, wave_tokens, offload, checkpointing=False, kernel="sdpa"):
    own = {"query_pre_attn_scalar": 32} if family.startswith("gemma") else {}
    mixture = {"output_router_logits": False} if family == "gpt-oss" else {}
    model = tiny_model(family, dtype=torch.bfloat16, **SIZES, **own, **mixture)

    def gradients_in_waves(model):
        model.config._attn_implementation_internal = kernel
        enable_tree(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = batch_of([SAMPLES])
        batch = {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()}
        train_in_waves(model, batch, plan_of(batch, wave_tokens), offload)
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    assert_at_most_twice_the_error(model, SAMPLES, device, gradients_in_waves)


@pytest.mark.gpu
@needs_device
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "offloaded"])
@pytest.mark.parametrize("wave_tokens", [30, 100])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_error_is_at_most_twice_that_of_npass(kernel, family, wave_tokens, offload):
    try:
        tree_attention_name(kernel)
    except ImportError as error:
        pytest.skip(str(error))
    check(family, DEVICE, wave_tokens, offload, checkpointing=wave_tokens == 100, kernel=kernel)


@pytest.mark.parametrize("family", ["qwen3", "gpt-oss"])
def test_the_same_comparison_on_cpu(family):
    check(family, "cpu", 30, offload=False)
