"""The report as JSON and as a table."""

import json

import pytest
from transformers import Qwen3Config

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat, tool_chat
from support.malformed_examples import MALFORMED
from trl_singlepass.reports.audit import audit, wording
from trl_singlepass.reports.audit.forecast import Schedule
from trl_singlepass.reports.audit.turns import TurnStats
from trl_singlepass.trees.sample import CompletionKind


CONFIG = Qwen3Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


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


def test_the_verdict_comes_first():
    lines = str(audit([chat(3), chat(2, 1)], make_tokenizer(), CONFIG)).splitlines()
    assert lines[1].startswith("A single pass saves")
    assert lines.index("Findings") < next(i for i, line in enumerate(lines) if line.startswith("Turns,"))


def test_columns_of_zeros_are_left_out_and_others_explained():
    report = str(audit([chat(3)], make_tokenizer(), max_length=10_000))
    assert "put" not in report
    assert "too long" not in report
    assert "followed: another turn follows" in report
    restored = " ".join(str(audit([chat(3)], make_tokenizer("deepseek_r1_distill"), max_length=1)).split())
    assert "too long: longer than max_length; followed: another turn follows" in restored
    assert "put back: reasoning that the template leaves out" in restored


def test_turns_after_the_twelfth_are_one_line():
    report = audit([chat(15), chat(13, 1)], make_tokenizer())
    rows = [line.split("│") for line in str(report).splitlines() if line.startswith("│ 1")]
    later = next(cells for cells in rows if cells[1].strip() == "13–15")
    assert int(later[2]) == sum(stats.turns for stats in report.by_turn[12:]) == 4
    assert max(int(cells[1]) for cells in rows if cells[1].strip().isdecimal()) == 12


def test_merged_counts_are_those_of_all_turns():
    report = audit([chat(4), tool_chat(), chat(2, 1)], make_tokenizer(), CONFIG)
    assert TurnStats.merge(report.by_turn) == report.all_turns


@pytest.mark.parametrize("config", [CONFIG, None], ids=["model", "no model"])
def test_every_heading_is_explained_where_it_stands(config):
    conversations = [MALFORMED["no assistant"][0], chat(3), chat(2, 1), tool_chat()]
    report = audit(conversations, make_tokenizer("deepseek_r1_distill"), config, max_length=1)
    tables = {table.title: table for table in report.tables}
    del tables["Rows that cannot be trained"]  # rows, first rows, reason
    for title, table in tables.items():
        _, *headings = (str(column.header).replace("\n", " ") for column in table.columns)
        explained = f"{title} {table.caption}".lower()
        plain = {"turns", "of all turns", "conversations", "tokens", "tokens trained"}
        assert [
            heading for heading in headings if heading not in plain and f"{heading.lower()}:" not in explained
        ] == []


def test_all_kinds_of_completions_and_schedules_are_explained():
    assert set(wording._KINDS) == {*CompletionKind, "refused"}
    assert set(wording._SCHEDULES) == set(Schedule)
