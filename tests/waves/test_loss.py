"""The load-balancing loss of waves adds up to that of transformers."""

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from trl_singlepass.waves.loss import LoadBalancingLoss


@pytest.mark.parametrize("multiplicity", [[1] * 6, [2, 2, 1, 1, 3, 1]])
def test_shares_and_their_gradients_add_up(multiplicity):
    torch.manual_seed(0)
    logits = [torch.randn(6, 4, requires_grad=True) for _ in range(2)]
    counts = torch.tensor([multiplicity])
    repeated = tuple(layer.repeat_interleave(counts[0], dim=0) for layer in logits)
    expected = load_balancing_loss_func(repeated, num_experts=4, top_k=2)
    gradients = torch.autograd.grad(expected, logits)

    loss = LoadBalancingLoss(num_experts=4, experts_per_token=2)
    waves = [([layer[first:last] for layer in logits], counts[:, first:last]) for first, last in ((0, 4), (4, 6))]
    for wave in waves:
        loss.count(*wave)
    total = sum(loss.share(*wave) for wave in waves)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, logits), gradients)
