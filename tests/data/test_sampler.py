"""Balance: ranks of a step get the same work, and training sees the same rows in the same steps as plain shuffling."""

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from support.conversations import chat
from support.sample_sets import reasoning_chat
from support.tiny_models import tiny_model
from support.trainers import largest_difference, logged, single_pass_trainer
from trl_singlepass.cost import ModelShape, single_pass_cost
from trl_singlepass.data.arrow import num_attention_pairs
from trl_singlepass.data.sampler import BalancedSampler, row_costs
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row


def sampler(costs, group_by_cost=False, seed=0, epoch=0, **layout):
    layout = {"batch_size": 1, "num_ranks": 2, "num_accumulated": 4, **layout}
    return BalancedSampler(
        np.asarray(costs, float), seed=seed, epoch=lambda: epoch, group_by_cost=group_by_cost, **layout
    )


layouts = st.fixed_dictionaries(
    {"batch_size": st.integers(1, 3), "num_ranks": st.integers(1, 4), "num_accumulated": st.integers(1, 4)}
)
many_costs = st.lists(st.integers(1, 1000), min_size=1, max_size=120)


@given(many_costs, layouts, st.booleans(), st.integers(0, 3))
def test_every_row_comes_once(costs, layout, group_by_cost, epoch):
    order = list(sampler(costs, group_by_cost, epoch=epoch, **layout))
    assert sorted(order) == list(range(len(costs)))


@given(many_costs, layouts)
def test_a_step_has_the_rows_of_a_plain_shuffle(costs, layout):
    one = sampler(costs, **layout)
    size = layout["batch_size"] * layout["num_ranks"] * layout["num_accumulated"]
    balanced, plain = one.order(0), one.order(0, balanced=False)
    for start in range(0, len(costs), size):
        assert sorted(balanced[start : start + size]) == sorted(plain[start : start + size])


@given(many_costs, layouts, st.booleans())
def test_balancing_never_makes_a_step_longer(costs, layout, group_by_cost):
    one = sampler(costs, group_by_cost, **layout)
    assert one.predicted_imbalance() <= one.predicted_imbalance(balanced=False) + 1e-9


def test_ranks_finish_together():
    costs = np.random.default_rng(0).lognormal(8, 0.8, 4096)
    for layout, most in (({"num_ranks": 2, "num_accumulated": 8}, 0.02), ({"num_ranks": 8, "batch_size": 2}, 0.06)):
        one = sampler(costs, **layout)
        assert one.predicted_imbalance() < most
        assert one.predicted_imbalance(balanced=False) > 5 * most
    assert sampler(costs, num_ranks=8, num_accumulated=1).predicted_imbalance() > 1
    assert sampler(costs, True, num_ranks=8, num_accumulated=1).predicted_imbalance() < 0.2


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_get_the_batches_that_were_composed_for_them(num_ranks):
    """The batches that accelerate hands each rank, summed by rank, are what the prediction is about."""
    costs = np.random.default_rng(0).lognormal(8, 0.8, 24 * num_ranks)
    one = sampler(costs, num_ranks=num_ranks, batch_size=2)
    shards = [
        list(BatchSamplerShard(BatchSampler(one, 2, drop_last=False), num_ranks, rank)) for rank in range(num_ranks)
    ]
    assert sorted(row for shard in shards for batch in shard for row in batch) == list(range(len(costs)))
    steps = np.array(
        [[costs[np.ravel(shard[start : start + 4])].sum() for shard in shards] for start in range(0, 12, 4)]
    )
    slowest = steps.max(axis=1).sum() / steps.mean(axis=1).sum() - 1
    assert one.predicted_imbalance() == pytest.approx(slowest)


def test_costs_are_those_of_counted_operations():
    """Up to the LM head, which costs the same per target wherever it stands."""
    config = tiny_model("qwen3").config
    shape = ModelShape.from_config(config)
    trees = [PrefixTree.from_samples(reasoning_chat(turns)) for turns in (2, 5, 9)]
    rows = [Row.from_tree(tree) for tree in trees]
    costs = row_costs(
        np.array([len(row) for row in rows]), np.array([num_attention_pairs(row) for row in rows]), config
    )
    counted = [single_pass_cost([tree], shape) for tree in trees]
    body = np.array([cost.flops - 3 * 2 * shape.head_parameters * cost.targets for cost in counted])
    assert costs / costs[0] == pytest.approx(body / body[0])


def test_grouping_by_length_goes_by_the_cost_of_rows_and_resumes(tmp_path, tokenizer):
    chats = [chat(1 + seed % 4, seed=seed) for seed in range(24)]
    settings = {
        "train_sampling_strategy": "group_by_length",
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "max_steps": -1,
    }
    whole = single_pass_trainer(tmp_path / "a", tokenizer, chats, save_strategy="steps", save_steps=15, **settings)
    batches = list(whole.get_train_dataloader())
    spread = [np.ptp(np.diff([0, *batch["tree"].plan.example_ends])) for batch in batches]
    assert len(batches) == 12
    assert np.mean(spread) < 50 < np.std(whole.train_dataset["num_tokens"])
    whole.train()
    resumed = single_pass_trainer(tmp_path / "a", tokenizer, chats, save_strategy="no", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-15"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert largest_difference(whole, resumed) == 0
