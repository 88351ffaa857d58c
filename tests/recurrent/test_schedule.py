"""Pieces of a row: as little as possible is replayed, and its gradients add up."""

import torch

from support.sample_sets import reasoning_chat
from trl_singlepass.recurrent.layout import SelectRepeatedly
from trl_singlepass.recurrent.schedule import fork_schedule, path_schedule
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row, TreePlan


def plan_of(samples):
    return TreePlan.from_rows([Row.from_tree(PrefixTree.from_samples(samples))])


def test_forks_run_no_token_twice_when_branches_are_long():
    schedule = fork_schedule(plan_of(reasoning_chat(6)))
    assert sum(piece.num_replayed for piece in schedule.pieces) == 0
    # All six branches together, after six pieces of history.
    assert len(schedule.batches) <= 6 + 2


def test_reach_bounds_the_history_that_is_replayed():
    plan = plan_of(reasoning_chat(6))
    assert max(piece.num_replayed for piece in path_schedule(plan, reach=3).pieces) == 3
    assert max(piece.num_replayed for piece in path_schedule(plan).pieces) > 40


def test_gradients_of_replayed_tokens_add_up_in_float32():
    tokens = torch.ones(2, 1, dtype=torch.bfloat16, requires_grad=True)
    SelectRepeatedly.apply(tokens, torch.zeros(1001, dtype=torch.long)).backward(torch.ones(1001, 1).bfloat16())
    assert tokens.grad.flatten().tolist() == [1000, 0]  # 1001 rounded; in bfloat16, ones add up to 256
