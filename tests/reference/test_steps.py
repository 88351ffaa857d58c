"""All schedules of a measurement are the same training step, and launches are counted forward and backward."""

import pytest
import torch

from support.tiny_families import tiny_model
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.reference.launches import LaunchCounter
from trl_singlepass.reference.npass import npass_loss_and_gradients
from trl_singlepass.reference.random_conversations import Sizes, conversation
from trl_singlepass.reference.steps import Schedule, make_step, wave_tokens_that_keep_the_history
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row, TreePlan
from trl_singlepass.waves import WavePlan


SAMPLES = conversation(3, 90, 0, Sizes(user=(3, 5), reasoning=(10, 20), answer=(4, 6), system=4))


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("family", ["qwen3", "gpt-oss"])
def test_every_schedule_is_the_training_step_of_npass(family, schedule):
    model = tiny_model(family, dtype=torch.float32, output_router_logits=False)
    expected = npass_loss_and_gradients(model, SAMPLES)
    enable_tree(model)
    loss = make_step(model, SAMPLES, schedule)()
    assert float(loss) == pytest.approx(expected.loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected.gradients[name]).norm() <= 1e-4 * expected.gradients[name].norm() + 1e-7, (
            name
        )


def test_waves_that_keep_the_history_run_nothing_twice():
    plan = TreePlan.from_rows([Row.from_tree(PrefixTree.from_samples(SAMPLES))])
    waves = WavePlan.from_tree_plan(plan, wave_tokens_that_keep_the_history(plan))
    assert len(waves.waves) > 1
    assert waves.num_repeated == 0
    assert WavePlan.from_tree_plan(plan, wave_tokens_that_keep_the_history(plan) - 1).num_repeated > 0


def test_launches_are_operators_that_write():
    x = torch.ones(3, 4, requires_grad=True)
    with LaunchCounter() as counter:
        y = torch.nn.functional.scaled_dot_product_attention(*[x.view(1, 1, 3, 4)] * 3, is_causal=True)
        y.exp().sum().backward()
    assert counter.operators["aten::exp"] == 1
    assert counter.operators["aten::mul"] == 1  # the gradient of exp
    assert not {"aten::view", "aten::detach", "aten::expand", "aten::empty"} & counter.operators.keys()
    assert [name for name in counter.attention_operators if name.endswith("_backward")] != []
    assert counter.total == sum(counter.operators.values())
    before = counter.total
    x.exp()
    assert counter.total == before
