"""Ranks that share a row exchange parts for heads, and back, with the gradients of one process."""

import pytest
import torch

from support.thread_ranks import on_ranks


SIZES = [(2, 4), (2, 3), (4, 4), (4, 6), (3, 2)]


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("size", "heads"), SIZES)
def test_every_head_sees_the_whole_row_once(size, heads):
    row = random(1, 3 * size, heads, 5)
    shares = on_ranks(size, lambda group: group.to_heads(group.part(row), heads))
    assert len({share.shape for share in shares}) == 1
    together = torch.cat(shares, dim=2)
    assert torch.equal(together[:, :, :heads], row)
    assert not together[:, :, heads:].any()


@pytest.mark.parametrize(
    ("size", "heads", "groups", "per_rank"),
    [(2, 8, 2, 1), (4, 8, 2, 1), (4, 12, 6, 3), (2, 4, 1, 1), (2, 8, 4, 2), (4, 6, 3, 2), (3, 4, 2, 2)],
)
def test_shared_keys_stay_with_their_heads(size, heads, groups, per_rank):
    keys = random(1, 2 * size, groups, 5)
    expected = keys.repeat_interleave(heads // groups, dim=2)
    shares = on_ranks(size, lambda group: group.to_heads(group.part(keys), heads))
    assert [share.shape[2] for share in shares] == [per_rank] * size
    repeated = [share.repeat_interleave(-(-heads // size) // per_rank, dim=2) for share in shares]
    assert torch.equal(torch.cat(repeated, dim=2)[:, :, :heads], expected)


@pytest.mark.parametrize(("size", "heads", "groups"), [(2, 4, 4), (4, 6, 3), (4, 4, 1)])
def test_gradients_are_those_of_one_process(size, heads, groups):
    row, factor = random(1, 2 * size, groups, 5), random(1, 2 * size, heads, 5)
    whole = row.clone().requires_grad_()
    (whole.repeat_interleave(heads // groups, dim=2).cumsum(1).square() * factor).sum().backward()

    def train(group):
        part = group.part(row).clone().requires_grad_()
        share = group.to_heads(part, heads)
        share = share.repeat_interleave(-(-heads // size) // share.shape[2], dim=2)
        (group.to_tokens(share.cumsum(1).square(), heads) * group.part(factor)).sum().backward()
        return part.grad

    torch.testing.assert_close(torch.cat(on_ranks(size, train), dim=1), whole.grad, rtol=0, atol=1e-12)


def test_a_loss_of_gathered_outputs_has_gradients_that_engines_average():
    """Every rank computes the same loss; the sum of its gradients over the ranks is then `size` times too large."""
    row = random(1, 8, 2)
    whole = row.clone().requires_grad_()
    (whole.cumsum(1).square().sum() * whole.sum()).backward()

    def train(group):
        part = group.part(row).clone().requires_grad_()
        (group.gather(part).cumsum(1).square().sum() * group.sum(part.sum())).backward()
        return part.grad

    torch.testing.assert_close(torch.cat(on_ranks(4, train), dim=1) / 4, whole.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("length", "size", "padded"), [(1, 2, 4), (5, 2, 6), (6, 2, 6), (7, 4, 8), (9, 4, 12)])
def test_every_rank_has_as_many_tokens_and_two_at_least(length, size, padded):
    tokens = torch.arange(length)[None]
    parts = on_ranks(size, lambda group: (group.padded_length(length), group.pad_and_part(tokens, fill=-1)))
    assert {length for length, _ in parts} == {padded}
    row = torch.cat([part for _, part in parts], dim=1)
    assert row.tolist() == [[*range(length), *[-1] * (padded - length)]]
    assert {part.shape[1] for _, part in parts} == {padded // size}


def test_parameters_are_divided_as_heads_are():
    per_head = random(6, 3)
    shares = on_ranks(4, lambda group: group.share_of_heads(per_head))
    assert torch.equal(torch.cat(shares)[:6], per_head)
    assert [share.shape[0] for share in shares] == [2, 2, 2, 2]
