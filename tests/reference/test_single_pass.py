"""The leak probe: silent on sound models, and on planted defects it says which kind they are."""

import pytest
import torch

from support.conversations import chat
from support.planted_defects import branch_misses_its_history, branch_sees_its_sibling, plant_defect
from support.sample_sets import reasoning_chat
from support.tiny_models import FAMILIES, tiny_model
from trl_singlepass import verify
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.reference import leak_probe


CONVERSATIONS = [chat(3), chat(2, seed=1)]


def test_the_verdict_names_a_leak(tokenizer, monkeypatch):
    plant_defect(monkeypatch, branch_sees_its_sibling)
    model = tiny_model("qwen3", vocab_size=len(tokenizer), dtype=torch.float32)
    assert "a turn sees tokens of another turn" in str(verify(model, tokenizer, CONVERSATIONS))
    enable_tree(model)
    assert leak_probe(model.eval(), reasoning_chat()).leaked > 0


def test_the_verdict_names_lost_history(tokenizer, monkeypatch):
    plant_defect(monkeypatch, branch_misses_its_history)
    model = tiny_model("qwen3", vocab_size=len(tokenizer), dtype=torch.float32)
    assert "have no effect on it" in str(verify(model, tokenizer, CONVERSATIONS))
    enable_tree(model)
    assert leak_probe(model.eval(), reasoning_chat()).blind > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_model_leaks_nothing(family):
    model = tiny_model(family, dtype=torch.float32).eval()
    enable_tree(model)
    assert leak_probe(model, reasoning_chat()).ok
