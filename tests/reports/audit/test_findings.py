"""Findings: every cause and policy has its sentence."""

import re

import pytest

from support.chat_tokenizers import make_tokenizer
from support.conversations import agentic_chat, chat, plain_chat, tool_chat
from trl_singlepass.reports.audit import audit, wording
from trl_singlepass.reports.audit.turns import BranchCause, ReasoningPolicy
from trl_singlepass.reports.html.audit import audit_page


PLURAL_OF_ONE = re.compile(r"(?<![\d,.])1 (?:conversations|turns|rows|samples|trees|tokens)\b")


def test_every_cause_of_a_branch_is_explained():
    assert set(wording._CAUSES) == set(BranchCause)


def test_every_policy_that_deserves_attention_is_explained():
    assert set(wording._POLICIES) == set(ReasoningPolicy) - {ReasoningPolicy.KEPT, ReasoningPolicy.REFUSED}


@pytest.mark.parametrize("template", ["qwen3", "gptoss", "glm4moe", "deepseek_r1_distill", "cohere"])
@pytest.mark.parametrize("turns", [1, 2])
def test_one_of_anything_is_singular(template, turns):
    """Every finding about one turn, row or conversation."""
    given_as_idea = [*chat(turns)[:-1], {"role": "assistant", "content": "It is 2.", "cot": "We add."}]
    rows = [chat(turns), plain_chat(turns), agentic_chat(), tool_chat(), given_as_idea, chat(1)[:2]]
    for row in rows:
        report = audit([row], make_tokenizer(template), max_length=1)
        for text in (str(report), audit_page(report, "Audit")):
            assert PLURAL_OF_ONE.findall(" ".join(text.split())) == []


@pytest.mark.parametrize(("part", "whole", "share"), [(1, 2, "50%"), (1, 1000, "less than 1%"), (3, 3, "100%")])
def test_small_shares_are_not_rounded_to_nothing(part, whole, share):
    assert wording._share(part, whole) == share
