"""All schedules of a measurement are the same training step, and the work that is timed is counted."""

import pytest
import torch

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat
from support.tiny_models import tiny_model
from support.trainers import float32_model
from trl_singlepass.cost import ModelShape, npass_cost
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.engine.wave_plan import WavePlan
from trl_singlepass.reference.npass import npass_loss_and_gradients
from trl_singlepass.reference.timing import (
    Schedule,
    Sizes,
    conversation,
    make_step,
    time_both,
    wave_tokens_that_keep_the_history,
)
from trl_singlepass.rendering.samples import render_example
from trl_singlepass.reports.audit import audit
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row, TreePlan


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")

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


def test_timing_counts_the_work_it_times():
    tokenizer = make_tokenizer()
    chats = [chat(3), chat(2, 1)]
    conversations = [render_example({"messages": messages}, tokenizer) for messages in chats]
    network, steps = float32_model(tokenizer), []
    timed = time_both(network, conversations, repeats=2, on_step=lambda: steps.append(1))
    assert len(steps) == 2 * 2 * 3
    assert network.config._attn_implementation.startswith("tree_")
    samples = [sample for turns in conversations for sample in turns]
    assert timed.npass_cost == npass_cost(samples, ModelShape.from_config(network.config))
    assert timed.npass_cost.tokens > timed.single_pass_cost.tokens
    assert timed.forecast == audit(chats, tokenizer, network.config).forecast.over_npass.value
