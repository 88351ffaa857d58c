"""The forecast: what each schedule computes, and what the report makes of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config

from support.chat_tokenizers import make_tokenizer
from support.conversations import agentic_chat, chat, tool_chat
from trl_singlepass.cost import ModelShape, npass_cost, single_pass_cost
from trl_singlepass.rendering.samples import render_example
from trl_singlepass.reports.audit import audit
from trl_singlepass.reports.audit.forecast import Schedule, count_conversation, make_forecast, maximal_chains
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.sample import Sample


CONFIG = Qwen3Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize(("template", "leaves"), [("qwen3", 3), ("glm4moe", 3), ("gptoss", 3), ("qwen3_8", 1)])
def test_leaves_of_an_agentic_chat(template, leaves):
    report = audit([agentic_chat()], make_tokenizer(template))
    assert (report.num_chains, report.all_turns.turns) == (leaves, 9)


def test_kept_history_is_one_sequence_and_saves_nothing_over_chains():
    report = audit([chat(4)], make_tokenizer("qwen3_8"), CONFIG)
    assert (report.all_turns.reasoning_hidden, report.all_turns.branches, report.num_chains) == (0, {}, 1)
    assert report.forecast.over_chains.value == 1
    assert "too little to matter compared with" in report.forecast.verdict


def test_single_turns_are_not_worth_a_tree():
    verdict = audit([chat(1), chat(1, 1)], make_tokenizer(), CONFIG).forecast.verdict
    assert "saves too little to matter" in verdict


def test_forecast_counts_what_each_schedule_computes():
    tokenizer, rows = make_tokenizer(), [chat(2), chat(3, 1), tool_chat()]
    samples = [render_example({"messages": row}, tokenizer) for row in rows]
    report, shape = audit(rows, tokenizer, CONFIG).forecast, ModelShape.from_config(CONFIG)
    trees = [PrefixTree.from_samples(turns) for turns in samples]
    assert report.costs[Schedule.NPASS] == npass_cost([s for turns in samples for s in turns], shape)
    assert report.costs[Schedule.SINGLE_PASS] == single_pass_cost(trees, shape)
    assert report.costs[Schedule.SHARED] == single_pass_cost(
        [PrefixTree.from_samples([sample for turns in samples for sample in turns])], shape
    )
    assert report.over_npass.value == report.costs[Schedule.NPASS].flops / report.costs[Schedule.SINGLE_PASS].flops
    assert (
        report.costs[Schedule.NPASS].tokens
        > report.costs[Schedule.CHAINS].tokens
        > report.costs[Schedule.SINGLE_PASS].tokens
    )


def test_rows_hold_a_bounded_number_of_shared_prefixes(monkeypatch):
    monkeypatch.setattr("trl_singlepass.reports.audit.forecast.ROW_TOKENS", 1)
    report = audit([chat(2), chat(2, 1)], make_tokenizer(), CONFIG).forecast
    assert report.costs[Schedule.SHARED] == report.costs[Schedule.SINGLE_PASS]


def test_without_a_model_the_forecast_counts_tokens_and_pairs():
    report = audit([chat(3)], make_tokenizer())
    assert not report.forecast.has_model
    assert report.forecast.over_npass.value == report.forecast.sharing_factor.value
    assert "of the tokens" in report.forecast.verdict
    assert report.forecast.costs[Schedule.NPASS].attention_pairs == sum(
        len(s) * (len(s) + 1) // 2 for s in render_example({"messages": chat(3)}, make_tokenizer())
    )


@given(st.lists(st.lists(st.integers(1, 2), min_size=2, max_size=6), min_size=1, max_size=6))
def test_chains_are_exact_and_none_begins_another(token_lists):
    samples = [Sample.from_prompt_and_completion(tokens[:1], tokens[1:]) for tokens in token_lists]
    chains = maximal_chains(samples)
    assert sum(chain.loss_weights.sum() for chain in chains) == sum(s.loss_weights.sum() for s in samples)
    begins = [a is not b and np.array_equal(a.token_ids, b.token_ids[: len(a)]) for a in chains for b in chains]
    assert not any(begins)


def test_the_forecast_needs_no_samples_to_be_kept():
    tokenizer, shape = make_tokenizer(), ModelShape.from_config(CONFIG)
    costs = [count_conversation(render_example({"messages": chat(3, i)}, tokenizer), shape) for i in range(3)]
    assert all(cost.first_prompt.dtype == np.int32 for cost in costs)
    assert make_forecast(costs, shape, 1.0).costs[Schedule.NPASS].tokens == sum(
        c.by_schedule[Schedule.NPASS].tokens for c in costs
    )
