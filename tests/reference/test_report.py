"""The report of `verify`."""

import pytest
import torch

from support.conversations import chat
from support.tiny_models import tiny_model
from trl_singlepass import verify


CONVERSATIONS = [chat(3), chat(2, seed=1)]


@pytest.fixture
def report(tokenizer):
    return verify(tiny_model("qwen3", vocab_size=len(tokenizer), dtype=torch.float32), tokenizer, CONVERSATIONS)


def test_losses_are_pooled_over_tokens(report):
    turns = [turn for row in report.rows for turn in row.turns]
    pooled = sum(turn.npass_loss * turn.num_tokens for turn in turns) / sum(turn.num_tokens for turn in turns)
    assert report.npass_loss == pytest.approx(pooled, rel=1e-6)
