"""Audit: which rows are looked at, in how many processes, rows that cannot be trained, and the report."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
from transformers import Qwen3Config

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat, tool_chat
from trl_singlepass.rendering.prefixes import Prefixes
from trl_singlepass.reports.audit import audit, report
from trl_singlepass.reports.audit.forecast import Schedule
from trl_singlepass.reports.audit.turns import BranchCause, ReasoningPolicy, TurnStats
from trl_singlepass.trees.sample import CompletionKind


CONFIG = Qwen3Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


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


def test_samples_are_drawn_at_random_and_have_an_interval():
    rows = datasets.Dataset.from_list([{"messages": chat(1 + i % 4, i)} for i in range(40)])
    tokenizer = make_tokenizer()
    whole = audit(rows, tokenizer).forecast.sharing_factor
    part = audit(rows, tokenizer, sample_size=20)
    assert (part.num_rows, part.num_audited) == (40, 20)
    assert part.forecast.sharing_factor.low < whole.value < part.forecast.sharing_factor.high
    assert (whole.low, whole.high) == (whole.value, whole.value)
    assert "20 rows drawn at random from 40" in str(part)
    assert part.to_dict() == audit(rows, tokenizer, sample_size=20).to_dict()
    assert part.to_dict() != audit(rows, tokenizer, sample_size=20, seed=1).to_dict()


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
        audit([chat(1)], make_tokenizer(), Odd())


@pytest.mark.slow
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
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], env=environment, capture_output=True, check=True
    )
    assert float(done.stdout) < 60


def test_processes_make_the_same_report():
    rows = [chat(3), tool_chat(), [{"role": "user", "content": "Why?"}], *[chat(2, seed) for seed in range(40)]]
    alone = audit(rows, make_tokenizer(), CONFIG)
    together = audit(rows, make_tokenizer(), CONFIG, num_proc=2)
    assert alone.errors, "one row cannot be trained"
    assert together.to_dict() == alone.to_dict()


def test_each_prefix_of_a_conversation_is_rendered_once(monkeypatch):
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


def test_text_of_the_data_is_shown_literally():
    report = audit([{"messages": [{"role": "[red]x[/red]", "content": "x"}]}], make_tokenizer())
    assert "[red]x[/red]" in str(report)


def test_report_is_json_and_a_table():
    report = audit([chat(3), tool_chat()], make_tokenizer(), CONFIG)
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["all_turns"]["turns"] == 6
    assert told["forecast"]["verdict"] == report.verdict
    assert told["findings"] == report.findings
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 118
    assert "sharing factor" in str(report)


def test_merged_counts_are_those_of_all_turns():
    report = audit([chat(4), tool_chat(), chat(2, 1)], make_tokenizer(), CONFIG)
    assert TurnStats.merge(report.by_turn) == report.all_turns


def test_whatever_is_counted_has_its_wording():
    kinds = {*CompletionKind, "refused"}
    assert set(report._KINDS) == kinds > set(report._ABOUT_KINDS)
    assert set(report._SCHEDULES) == set(Schedule)
    assert set(report._CAUSES) == set(BranchCause)
    assert set(report._POLICIES) == set(ReasoningPolicy) - {ReasoningPolicy.KEPT, ReasoningPolicy.REFUSED}
    counts = {one.name for one in fields(TurnStats)}
    assert {*report._ABOUT_COUNTS, *report._OUT_OF, *report._OUT_OF.values()} < counts
