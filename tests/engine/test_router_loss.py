"""The load-balancing loss of waves adds up to that of transformers."""

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from support.thread_ranks import on_ranks
from trl_singlepass.engine.router_loss import LoadBalancingLoss


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


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_share_a_row_have_its_loss(size):
    """Of 7 tokens, padded; the sum of gradients over the ranks is `size` times the gradient of the loss."""
    torch.manual_seed(0)
    counts = torch.tensor([[2, 2, 1, 1, 3, 1, 1]])
    logits = [torch.randn(7, 4, requires_grad=True) for _ in range(2)]
    repeated = tuple(layer.repeat_interleave(counts[0], dim=0) for layer in logits)
    expected = load_balancing_loss_func(repeated, num_experts=4, top_k=2)
    gradients = torch.autograd.grad(expected, logits)

    def run(group):
        own = [group.pad_and_part(layer.detach().T).T.clone().requires_grad_() for layer in logits]
        loss = LoadBalancingLoss(num_experts=4, experts_per_token=2, group=group)
        loss.count(own, counts)
        total = loss.share(own, counts)
        return total, torch.autograd.grad(total, own)

    results = on_ranks(size, run)
    for total, _ in results:
        torch.testing.assert_close(total, expected)
    for layer, gradient in enumerate(gradients):
        together = torch.cat([parts[layer] for _, parts in results])[:7] / size
        torch.testing.assert_close(together, gradient)
