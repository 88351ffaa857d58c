"""Timing counts the work that it times."""

import pytest

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat
from support.trainers import float32_model
from trl_singlepass.cost import ModelShape, npass_cost
from trl_singlepass.reference import timing
from trl_singlepass.rendering.samples import render_example
from trl_singlepass.reports.audit import audit


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")


def test_timing_counts_the_work_it_times():
    tokenizer = make_tokenizer()
    chats = [chat(3), chat(2, 1)]
    conversations = [render_example({"messages": messages}, tokenizer) for messages in chats]
    network, steps = float32_model(tokenizer), []
    timed = timing.time_both(network, conversations, repeats=2, on_step=lambda: steps.append(1))
    assert len(steps) == 2 * 2 * 3
    assert network.config._attn_implementation.startswith("tree_")
    samples = [sample for turns in conversations for sample in turns]
    assert timed.npass_cost == npass_cost(samples, ModelShape.from_config(network.config))
    assert timed.npass_cost.tokens > timed.single_pass_cost.tokens
    assert timed.forecast == audit(chats, tokenizer, network.config).forecast.over_npass.value
