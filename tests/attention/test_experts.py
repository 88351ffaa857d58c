"""Mixtures of experts: the auxiliary loss counts samples, and experts computed at once agree with N-pass."""

import pytest
import torch

from support.float64_comparison import forward
from support.sample_sets import branchy_chat
from support.tiny_models import model_of_type
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.engine.model_call import row_context
from trl_singlepass.reference import npass_loss_and_gradients, single_pass_loss_and_gradients
from trl_singlepass.reference.verification import ForcedFloat64


WITH_AUXILIARY_LOSS = ["qwen2_moe", "qwen3_moe", "gpt_oss", "mixtral", "granitemoehybrid", "jamba", "qwen3_next"]


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_next", "deepseek_v3"])
def test_experts_computed_at_once_equal_npass_in_float32(model_type, experts):
    model = model_of_type(model_type, initializer_range=0.05).float()
    model.set_experts_implementation(experts)
    expected = npass_loss_and_gradients(model, branchy_chat())
    enable_tree(model)
    found = single_pass_loss_and_gradients(model, branchy_chat())
    assert abs(found.loss - expected.loss) <= 1e-6 * expected.loss
    gradient = torch.cat([expected.gradients[name].flatten() for name in expected.gradients])
    error = torch.cat([found.gradients[name].flatten() for name in expected.gradients]) - gradient
    assert error.norm() <= 1e-6 * gradient.norm()


@pytest.mark.parametrize("model_type", WITH_AUXILIARY_LOSS)
def test_auxiliary_loss_counts_a_shared_token_once_per_sample(model_type):
    model = model_of_type(model_type)
    enable_tree(model)
    with ForcedFloat64():
        outputs, batch = forward(model, [branchy_chat()])
        with row_context(batch["tree"]):
            ones = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                attention_mask=torch.ones_like(batch["attention_mask"]),
                output_router_logits=True,
                use_cache=False,
            )
    # The survey compares it with N-pass; here, that the comparison can tell.
    assert batch["attention_mask"].max() > 1
    assert abs(outputs.aux_loss - ones.aux_loss) > 1e-6 * abs(ones.aux_loss)
