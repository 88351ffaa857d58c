"""Findings: every cause and policy has its sentence."""

import pytest

from trl_singlepass.reports.audit import findings
from trl_singlepass.reports.audit.templates import ReasoningPolicy
from trl_singlepass.reports.audit.turns import BranchCause


def test_every_cause_of_a_branch_is_explained():
    assert set(findings._CAUSES) == set(BranchCause)


def test_every_policy_that_deserves_attention_is_explained():
    assert set(findings._POLICIES) == set(ReasoningPolicy) - {ReasoningPolicy.KEPT, ReasoningPolicy.REFUSED}


@pytest.mark.parametrize(("part", "whole", "share"), [(1, 2, "50%"), (1, 1000, "less than 1%"), (3, 3, "100%")])
def test_small_shares_are_not_rounded_to_nothing(part, whole, share):
    assert findings._share(part, whole) == share
