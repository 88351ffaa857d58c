"""Audit: what the notes on real templates say, found by looking; sampling; rows that cannot be trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config

import trl_singlepass
from support.chat_templates import HARD_TEMPLATES
from support.chat_tokenizers import make_tokenizer, template_text
from support.conversations import TOOLS, chat, tool_chat
from trl_singlepass.cost import ModelShape, npass_cost, single_pass_cost
from trl_singlepass.cost.flops import shape_of
from trl_singlepass.rendering.prefixes import Prefixes
from trl_singlepass.rendering.samples import render_row
from trl_singlepass.reports.audit import audit
from trl_singlepass.reports.audit.estimates import ratio
from trl_singlepass.reports.audit.forecast import (
    CHAINS,
    NPASS,
    SHARED,
    SINGLE_PASS,
    conversation_cost,
    forecast,
    maximal_chains,
)
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.sample import Sample


CONFIG = Qwen3Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


def without_reasoning(messages):
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]


def plain(turns):
    return without_reasoning(chat(turns))


def agentic():
    """Three user turns, each with two tool-calling steps and an answer: nine renderings."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    messages = []
    for turn in range(3):
        messages.append({"role": "user", "content": f"Question {turn}."})
        for step in range(2):
            reasoning = f"Step {step} of {turn}."
            messages.append({"role": "assistant", "reasoning_content": reasoning, "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": "add", "content": f"Result {step} of {turn}."})
        messages.append({"role": "assistant", "reasoning_content": f"Done {turn}.", "content": f"Answer {turn}."})
    return {"messages": messages, "tools": TOOLS}


def test_it_is_public():
    assert trl_singlepass.audit is audit
    assert trl_singlepass.AuditReport is type(audit([chat(1)], make_tokenizer()))


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("qwen3", "stripped"),
        ("qwen3_5_think", "stripped"),
        ("gptoss", "stripped"),
        ("glm4moe", "stripped"),
        ("nemotron_3_nano", "stripped"),
        ("lfm2_2_5", "stripped"),
        ("qwen3_8", "kept"),
        ("llama3", "kept"),
        ("deepseek_r1_distill", "stripped from every turn"),
    ],
)
def test_template_class_is_measured(template, kind):
    report = audit([plain(2)], make_tokenizer(template))
    assert [facts.kind for facts, _ in report.templates] == [kind]


def test_a_template_that_keeps_some_earlier_turns_is_mixed():
    forgets_the_first = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content and (loop.index0 > 1 or loop.last) %}<think>{{ m.reasoning_content }}</think>"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% endif %}"
    )
    report = audit([chat(3)[1:]], make_tokenizer(), chat_template=forgets_the_first)
    assert report.templates[0][0].kind == "mixed"


def test_arguments_that_change_the_template_are_told_apart():
    rows = [{"messages": chat(2)}, {"messages": chat(2, 1), "chat_template_kwargs": {"preserve_thinking": True}}]
    report = audit(rows, make_tokenizer("qwen3_6"))
    assert sorted((facts.kind, count) for facts, count in report.templates) == [("kept", 1), ("stripped", 1)]


@pytest.mark.parametrize(("template", "leaves"), [("qwen3", 3), ("glm4moe", 3), ("gptoss", 3), ("qwen3_8", 1)])
def test_leaves_of_an_agentic_chat(template, leaves):
    report = audit([agentic()], make_tokenizer(template))
    assert (report.num_chains, report.all_turns.turns) == (leaves, 9)


def test_stripped_history_hides_reasoning_and_makes_turns_branch():
    stats = audit([chat(4)], make_tokenizer()).all_turns
    assert (stats.reasoning_found, stats.reasoning_hidden, stats.branches) == (4, 3, {"reasoning removed": 3})


def test_kept_history_is_one_sequence_and_saves_nothing_over_chains():
    report = audit([chat(4)], make_tokenizer("qwen3_8"), CONFIG)
    assert (report.all_turns.reasoning_hidden, report.all_turns.branches, report.num_chains) == (0, {}, 1)
    assert report.forecast.over_chains.value == 1
    assert "too little to matter over" in report.forecast.verdict


def test_single_turns_are_not_worth_a_tree():
    verdict = audit([chat(1), chat(1, 1)], make_tokenizer(), CONFIG).forecast.verdict
    assert "saves too little to matter" in verdict


def test_empty_reasoning_blocks_make_every_turn_branch():
    report = audit([plain(4)], make_tokenizer())
    assert report.all_turns.branches == {"empty reasoning block": 3}
    assert report.num_chains == 4


def test_other_stop_token_in_history():
    report = audit([plain(4)], make_tokenizer("gptoss"))
    facts = report.templates[0][0]
    assert (facts.last_ending, facts.history_ending) == ("<|return|>", "<|end|>")
    assert report.all_turns.branches == {"other stop token": 3}
    assert any("<|return|>" in finding and "<|end|>" in finding for finding in report.findings)


def test_missing_stop_token():
    report = audit([chat(3)], make_tokenizer("glm4moe"))
    assert report.all_turns.stop_added == 3
    assert any("<|user|> is added" in finding for finding in report.findings)
    assert audit([chat(3)], make_tokenizer()).all_turns.stop_added == 0


def test_reasoning_left_out_of_every_turn_is_put_back():
    report = audit([chat(3)], make_tokenizer("deepseek_r1_distill"))
    assert (report.all_turns.reasoning_found, report.all_turns.reasoning_restored) == (3, 3)
    assert report.num_trainable == 1


def test_dropped_tool_calls():
    report = audit([{"messages": tool_chat(), "tools": TOOLS}, chat(2)], make_tokenizer("deepseek_r1_distill"))
    assert (report.all_turns.with_calls, report.all_turns.calls_lost) == (1, 1)
    assert [(error.count, error.rows) for error in report.errors] == [(1, (0,))]
    assert "'add' is lost" in report.errors[0].reason
    assert report.num_trainable == 1
    assert audit([{"messages": tool_chat(), "tools": TOOLS}], make_tokenizer()).all_turns.calls_lost == 0


def test_reasoning_under_a_key_that_the_template_ignores():
    messages = [
        {("cot" if key == "reasoning_content" else key): value for key, value in message.items()}
        for message in chat(2)
    ]
    report = audit([messages, chat(2)], make_tokenizer())
    assert (report.all_turns.reasoning_under_other_key, report.all_turns.reasoning_found) == (2, 2)
    assert report.errors[0].count == 1
    assert "'cot'" in report.errors[0].reason


def test_reasoning_without_a_place_is_lost():
    stats = audit([chat(2)], make_tokenizer("llama3")).all_turns
    assert (stats.reasoning_lost, stats.reasoning_found) == (2, 0)


def test_prompts_that_are_no_token_prefixes():
    # The prompt ends in "\n", and in the rendering a token reaches over it.
    template = template_text("qwen3").replace("<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\n<think>\\n' }}")
    assert template != template_text("qwen3")
    tokenizer = make_tokenizer(chat_template=template)
    assert len(tokenizer("\n\n")["input_ids"]) < 2 * len(tokenizer("\n")["input_ids"])
    stats = audit([plain(3)], tokenizer).all_turns
    assert (stats.not_token_prefix, stats.prompt_changed) == (3, 0)
    assert audit([chat(3)], tokenizer).all_turns.not_token_prefix == 0
    assert audit([plain(3)], make_tokenizer()).all_turns.not_token_prefix == 0


def test_prompts_that_the_answer_changes():
    report = audit([agentic()], make_tokenizer("gptoss"))
    assert report.all_turns.prompt_changed == 3  # at each final answer, the analysis before its tool calls disappears
    assert report.all_turns.kinds == {"as served": 6, "history rewritten": 3}
    assert "In 3 of 9 turns, the template rewrites earlier messages once the answer is there." in str(report)


def test_turns_are_counted_by_how_they_were_rendered():
    lost = [plain(1)[0], {"role": "assistant", "cot": "?", "content": "!"}]
    kinds = audit([chat(2), lost], make_tokenizer()).all_turns.kinds
    assert kinds == {"as served": 2, "refused": 1}
    assert audit([chat(2)], make_tokenizer("deepseek_r1_distill")).all_turns.kinds == {"reasoning restored": 2}
    closed = make_tokenizer(None, HARD_TEMPLATES["closed prompt"].source)
    assert audit([plain(2)], closed).all_turns.kinds == {"opening continued": 2}


def test_token_counts_and_turns_over_max_length():
    tokenizer, rows = make_tokenizer(), [chat(2), chat(3, 1)]
    samples = [render_row({"messages": row}, tokenizer) for row in rows]
    limit = sorted(len(sample) for turns in samples for sample in turns)[2]
    report = audit(rows, tokenizer, max_length=limit)
    assert report.all_turns.prompt_tokens == sum(s.prompt_length for turns in samples for s in turns)
    assert report.all_turns.reasoning_tokens == sum(s.reasoning_length for turns in samples for s in turns)
    assert report.all_turns.over_max_length == 2
    assert [stats.turns for stats in report.by_turn] == [2, 2, 1]
    assert report.by_turn[1].prompt_tokens == sum(turns[1].prompt_length for turns in samples)
    assert report.sample_lengths.largest == max(len(sample) for turns in samples for sample in turns)
    assert sum(report.sample_lengths.counts) == 5


def test_the_models_length_is_the_default_limit():
    assert audit([chat(2)], make_tokenizer(), Qwen3Config(max_position_embeddings=9)).all_turns.over_max_length == 2


def test_forecast_counts_what_each_schedule_computes():
    tokenizer, rows = make_tokenizer(), [chat(2), chat(3, 1), tool_chat()]
    samples = [render_row({"messages": row}, tokenizer) for row in rows]
    report, shape = audit(rows, tokenizer, CONFIG).forecast, ModelShape.from_config(CONFIG)
    assert report.costs[NPASS] == npass_cost([s for turns in samples for s in turns], shape)
    assert report.costs[SINGLE_PASS] == single_pass_cost([PrefixTree.from_samples(turns) for turns in samples], shape)
    assert report.costs[SHARED] == single_pass_cost(
        [PrefixTree.from_samples([sample for turns in samples for sample in turns])], shape
    )
    assert report.over_npass.value == report.costs[NPASS].flops / report.costs[SINGLE_PASS].flops
    assert report.costs[NPASS].tokens > report.costs[CHAINS].tokens > report.costs[SINGLE_PASS].tokens


def test_rows_hold_a_bounded_number_of_shared_prefixes(monkeypatch):
    monkeypatch.setattr("trl_singlepass.reports.audit.forecast.ROW_TOKENS", 1)
    report = audit([chat(2), chat(2, 1)], make_tokenizer(), CONFIG).forecast
    assert report.costs[SHARED] == report.costs[SINGLE_PASS]


def test_without_a_model_the_forecast_counts_tokens_and_pairs():
    report = audit([chat(3)], make_tokenizer())
    assert not report.forecast.has_model
    assert report.forecast.over_npass.value == report.forecast.sharing_factor.value
    assert "of the tokens" in report.forecast.verdict
    assert report.forecast.costs[NPASS].attention_pairs == sum(
        len(s) * (len(s) + 1) // 2 for s in render_row({"messages": chat(3)}, make_tokenizer())
    )


@given(st.lists(st.lists(st.integers(1, 2), min_size=2, max_size=6), min_size=1, max_size=6))
def test_chains_are_exact_and_none_begins_another(token_lists):
    samples = [Sample.from_prompt_and_completion(tokens[:1], tokens[1:]) for tokens in token_lists]
    chains = maximal_chains(samples)
    assert sum(chain.loss_weights.sum() for chain in chains) == sum(s.loss_weights.sum() for s in samples)
    begins = [a is not b and np.array_equal(a.token_ids, b.token_ids[: len(a)]) for a in chains for b in chains]
    assert not any(begins)


def test_other_recipes():
    report = audit([chat(4)], make_tokenizer())
    by_name = {recipe.name: recipe for recipe in report.recipes}
    swapped, last = by_name["TRL assistant_only_loss"], by_name["last turn only"]
    samples = render_row({"messages": chat(4)}, make_tokenizer())
    # TRL's training template for Qwen3 keeps all reasoning: it is trained, but in contexts that inference never shows.
    assert swapped.reasoning_not_trained == 0
    first = len(samples[0]) - samples[0].prompt_length
    assert 0 < swapped.trained_tokens - swapped.unlike_inference <= first
    assert last.reasoning_not_trained == sum(sample.reasoning_length for sample in samples[:-1])
    assert (last.unlike_inference, last.trained_tokens) == (0, len(samples[-1]) - samples[-1].prompt_length)


def test_recipes_whose_template_strips_lose_the_reasoning_of_earlier_turns():
    report = audit([chat(4)], make_tokenizer("glm4moe"))
    samples = render_row({"messages": chat(4)}, make_tokenizer("glm4moe"))
    recipe = next(recipe for recipe in report.recipes if recipe.name == "TRL assistant_only_loss")
    assert recipe.reasoning_not_trained == sum(sample.reasoning_length for sample in samples[:-1])
    assert any("would not train" in finding for finding in report.findings)


def test_recipes_that_cannot_be_used_say_why():
    template = template_text("qwen3") + "{# mine #}"
    report = audit([chat(2)], make_tokenizer(chat_template=template))
    assert any("assistant_only_loss cannot be used" in finding for finding in report.findings)


def test_prompt_and_completion_rows_are_audited_on_the_completion():
    messages = chat(2)
    report = audit([{"prompt": messages[:-1], "completion": messages[-1:]}], make_tokenizer())
    assert report.all_turns.turns == 1
    recipe = report.recipes[0]
    assert recipe.trained_tokens <= recipe.completion_tokens + 8  # nothing of the prompt's own assistant message


def test_bad_rows_are_counted_with_their_reason():
    rows = [
        {"messages": chat(1)},
        {"messages": [{"role": "user", "content": "[bold]Hi"}]},
        {"text": "x"},
        {"messages": [3]},
    ]
    report = audit(rows, make_tokenizer())
    assert (report.num_audited, report.num_trainable, len(report.errors)) == (4, 1, 3)
    assert sorted(row for error in report.errors for row in error.rows) == [1, 2, 3]
    assert "3 of 4 rows" in report.findings[0]
    assert any("at least one assistant message" in error.reason for error in report.errors)


def test_turns_that_are_tokens_already_have_sizes_and_a_forecast():
    turns = [
        {"prompt_ids": [5, 6], "completion_ids": [7, 8]},
        {"prompt_ids": [5, 6, 8], "completion_ids": [9]},
    ]
    report = audit([{"turns": turns}], make_tokenizer(), CONFIG)
    assert (report.num_trainable, report.all_turns.turns, report.all_turns.trainable) == (1, 0, 2)
    assert [stats.answer_tokens for stats in report.by_turn] == [2, 1]
    assert "2 turns" in str(report)


def test_rows_without_a_trained_turn_are_counted():
    messages = [{**message, "weight": 0} for message in chat(2)]
    report = audit([{"messages": messages}, {"messages": chat(1)}], make_tokenizer())
    assert [(error.rows, error.reason[:15]) for error in report.errors] == [((0,), "All its turns h")]


def test_rows_that_fail_alike_are_one_reason():
    rows = [{"messages": [*chat(1)[:-1], {"role": "assistant", "content": "x", "cot": f"why {i}"}]} for i in range(7)]
    report = audit(rows, make_tokenizer())
    assert [(error.count, error.rows) for error in report.errors] == [(7, (0, 1, 2, 3, 4, 5, 6))]
    assert report.forecast is None
    assert "7 of 7 rows" in str(report)


def test_text_of_the_data_is_shown_literally():
    report = audit([{"messages": [{"role": "[red]x[/red]", "content": "x"}]}], make_tokenizer())
    assert "[red]x[/red]" in str(report)


def test_report_is_json_and_a_table():
    report = audit([chat(3), tool_chat()], make_tokenizer(), CONFIG)
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["all_turns"]["turns"] == 6
    assert told["forecast"]["verdict"] == report.forecast.verdict
    assert told["findings"] == report.findings
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 118
    assert "sharing factor" in str(report)


def test_samples_are_drawn_at_random_and_have_an_interval():
    rows = datasets.Dataset.from_list([{"messages": chat(1 + i % 4, i)} for i in range(40)])
    tokenizer = make_tokenizer()
    whole = audit(rows, tokenizer).forecast.sharing_factor
    part = audit(rows, tokenizer, sample_size=20)
    assert (part.num_rows, part.num_audited) == (40, 20)
    assert part.forecast.sharing_factor.low < whole.value < part.forecast.sharing_factor.high
    assert (whole.low, whole.high) == (whole.value, whole.value)
    assert "20 rows drawn from 40" in str(part)
    assert part.to_dict() == audit(rows, tokenizer, sample_size=20).to_dict()
    assert part.to_dict() != audit(rows, tokenizer, sample_size=20, seed=1).to_dict()


def test_ratio_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    bottom = rng.uniform(1, 3, 2000)
    top = 2 * bottom + rng.normal(0, 1, 2000)
    truth, covered = top.sum() / bottom.sum(), 0
    for _ in range(300):
        drawn = rng.permutation(2000)[:100]
        estimate = ratio(top[drawn], bottom[drawn], 100 / 2000)
        covered += estimate.low <= truth <= estimate.high
    assert 0.91 <= covered / 300 <= 0.99


def test_one_conversation_of_many_has_no_interval():
    assert str(ratio([3.0], [2.0], 0.5)) == "1.50 ± ?"
    assert str(ratio([3.0], [2.0], 1)) == "1.50"


def test_streams_are_audited_from_their_start():
    stream = datasets.Dataset.from_list([{"messages": chat(2, i)} for i in range(9)]).to_iterable_dataset()
    report = audit(stream, make_tokenizer(), sample_size=4)
    assert (report.num_rows, report.num_audited) == (None, 4)
    assert "the first 4 rows of a stream" in str(report)


@pytest.mark.parametrize(
    ("dataset", "kwargs", "message"),
    [
        ([], {}, "the dataset is empty"),
        ([chat(1)], {"sample_size": 0}, "sample_size must be 1 or more"),
    ],
)
def test_what_cannot_be_audited(dataset, kwargs, message):
    with pytest.raises(ValueError, match=message):
        audit(dataset, make_tokenizer(), **kwargs)


def test_a_tokenizer_without_a_template():
    with pytest.raises(ValueError, match="has no chat template"):
        audit([chat(1)], make_tokenizer(None))


def test_a_model_whose_operations_cannot_be_counted():
    class Odd(Qwen3Config):
        def __getattribute__(self, name):
            if name == "num_attention_heads":
                raise AttributeError("no heads")
            return super().__getattribute__(name)

    with pytest.raises(ValueError, match="cannot be counted"):
        shape_of(Odd())


def test_the_forecast_needs_no_samples_to_be_kept():
    tokenizer, shape = make_tokenizer(), ModelShape.from_config(CONFIG)
    costs = [conversation_cost(render_row({"messages": chat(3, i)}, tokenizer), shape) for i in range(3)]
    assert all(cost.first_prompt.dtype == np.int32 for cost in costs)
    assert forecast(costs, shape, 1.0).costs[NPASS].tokens == sum(c.by_schedule[NPASS].tokens for c in costs)


def test_ten_thousand_rows_are_sampled_in_bounded_time():
    code = """
import sys, time, datasets
sys.path.insert(0, "tests")
from support.chat_tokenizers import make_tokenizer
from support.conversations import chat
from trl_singlepass.reports.audit import audit
rows = datasets.Dataset.from_list([{"messages": chat(4, i % 50)} for i in range(10_000)])
start = time.process_time()
report = audit(rows, make_tokenizer())
assert report.num_audited == 500
print(time.process_time() - start)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment, capture_output=True, check=True
    )
    assert float(done.stdout) < 60


def test_processes_make_the_same_report():
    rows = [chat(3), tool_chat(), [{"role": "user", "content": "Why?"}], *[chat(2, seed) for seed in range(40)]]
    alone = audit(rows, make_tokenizer(), CONFIG)
    together = audit(rows, make_tokenizer(), CONFIG, num_proc=2)
    assert alone.errors, "one row cannot be trained"
    assert together.to_dict() == alone.to_dict()


def test_beginnings_of_a_conversation_are_rendered_once(monkeypatch):
    tokenizer, rendered = make_tokenizer(), []
    audit([chat(2)], tokenizer)  # the first conversation is compared with `apply_chat_template`
    render = Prefixes._fast

    def counted(prefixes, messages, add_generation_prompt):
        rendered.append((len(messages), add_generation_prompt))
        return render(prefixes, messages, add_generation_prompt)

    monkeypatch.setattr(Prefixes, "_fast", counted)
    messages = chat(6)
    audit([messages], tokenizer)
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    assert sorted(rendered) == sorted([(k, True) for k in turns] + [(k + 1, False) for k in turns])
