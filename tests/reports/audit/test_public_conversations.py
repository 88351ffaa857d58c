"""Audit of public conversations: how much they share, and what stock templates do to them."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from support.chat_tokenizers import make_tokenizer, template_text
from trl_singlepass.reports.audit import audit


SHARED = Path(__file__).parents[4] / "shared"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the conversations in ../shared")


def conversations_of(name):
    with (SHARED / "data" / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("name", "sharing_factor", "over_chains", "leaves", "turns"),
    [
        ("llamafactory_reason_tool_use", 1.84, 1.22, 70, 112),
        ("taubench_gpt4o_airline", 7.88, 7.88, 642, 642),
        ("mathchat_follow_up_300", 1.32, 1.32, 900, 900),
    ],
)
def test_public_conversations_under_qwen3(name, sharing_factor, over_chains, leaves, turns):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen3")
    tokenizer.chat_template = template_text("qwen3")
    report = audit(conversations_of(name), tokenizer)
    assert report.forecast.sharing_factor.value == pytest.approx(sharing_factor, abs=0.01)
    assert report.forecast.over_chains.value == pytest.approx(over_chains, abs=0.01)
    assert (report.num_chains, report.all_turns.turns) == (leaves, turns)
    assert report.all_turns.not_token_prefix == 0


@pytest.mark.parametrize("template", ["qwen3", "gptoss", "glm4moe", "deepseek_r1_distill"])
@pytest.mark.parametrize("name", ["llamafactory_reason_tool_use", "taubench_gpt4o_airline", "mathchat_follow_up_300"])
def test_what_stock_templates_do_to_public_conversations(name, template):
    rows = conversations_of(name)[:12]
    report = audit(rows, make_tokenizer(template))
    stats, says_reasoning = report.all_turns, name != "taubench_gpt4o_airline"
    assert stats.turns == sum(message["role"] == "assistant" for row in rows for message in row["messages"])
    assert stats.reasoning_found + stats.reasoning_lost == (stats.turns if says_reasoning else 0)
    # DeepSeek's template leaves out all reasoning, and loses tool calls: such turns are refused as a whole.
    refused = stats.kinds.get("refused", 0) if template == "deepseek_r1_distill" and says_reasoning else 0
    assert stats.reasoning_lost == refused
    assert stats.reasoning_restored == (stats.reasoning_found if template == "deepseek_r1_distill" else 0)
    assert stats.stop_added == (stats.turns if template == "glm4moe" else 0)
    causes = set(stats.branches)
    if not says_reasoning:
        expected = {
            "qwen3": {"empty reasoning block"},
            "deepseek_r1_distill": {"empty reasoning block"},
            "gptoss": {"other stop token", "earlier history rewritten"},
        }
        assert causes == expected.get(template, set())
    if template == "deepseek_r1_distill":
        assert stats.calls_lost == stats.with_calls
    if name == "mathchat_follow_up_300":
        assert stats.reasoning_hidden == sum(stats.branches.values()) == 24
        assert report.num_trainable == 12
