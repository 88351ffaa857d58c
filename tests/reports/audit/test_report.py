"""The report as JSON and as a table."""

import json

from transformers import Qwen3Config

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat, tool_chat
from trl_singlepass.reports.audit import audit


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
