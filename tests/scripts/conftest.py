"""A tiny model, and small files of conversations and of pairs, on disk."""

import json

import pytest

from support.conversations import TOOLS, chat, tool_chat
from support.pairs import pair
from support.small_files import data as data
from support.small_files import model as model
from trl_singlepass import SinglePassDPOTrainer, SinglePassSFTTrainer


@pytest.fixture
def pairs(tmp_path):
    """A file of pairs; in one, only the chosen side calls a tool, with arguments as an object."""
    called = tool_chat()
    with_tools = {"prompt": called[:1], "chosen": called[1:], "rejected": chat(1, 7)[1:], "tools": TOOLS}
    rows = [pair(2, 0), pair(2, 1, rejected_turns=1), with_tools, pair(1, 3)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def trained(monkeypatch):
    """The trainers that have trained."""
    trained = []
    for trainer in (SinglePassSFTTrainer, SinglePassDPOTrainer):

        def remember(self, *args, original=trainer.train, **kwargs):
            trained.append(self)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(trainer, "train", remember)
    return trained
