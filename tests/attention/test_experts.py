"""Mixtures of experts: the auxiliary loss counts samples, and experts computed at once agree with N-pass."""

import pytest
import torch

from support.sample_sets import branchy_chat
from support.tiny_models import model_of_type
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.reference import npass_loss_and_gradients, single_pass_loss_and_gradients


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
