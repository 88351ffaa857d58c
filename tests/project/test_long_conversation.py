"""The benchmark of long conversations measures what it says, on small ones."""

import pytest

from benchmarks.long_conversation import Case, agent, measure_preparation, measure_step
from support.chat_tokenizers import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer("qwen3").save_pretrained(folder)
    return str(folder)


def test_an_agent_calls_once_per_turn_and_is_asked_every_20():
    messages = agent(45, 10)
    assert [message["role"] for message in messages].count("assistant") == 45
    assert [message["role"] for message in messages].count("user") == 3


@pytest.mark.slow
def test_sizes_are_about_those_wanted(tokenizer):
    facts = measure_preparation(Case(tokenizer, turns=60, tokens=30_000, wave_tokens=2048))
    assert facts["tree_tokens"] == pytest.approx(30_000, rel=0.2)
    assert facts["waves"] >= facts["tree_tokens"] / 2048
    assert 0 < facts["template_seconds"] < facts["preparation_seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("window", [False, True])
def test_waves_hold_the_keys_and_values_that_are_counted(tokenizer, window):
    facts = measure_step(Case(tokenizer, turns=40, tokens=20_000, step=True, window=window, wave_tokens=1024))
    assert facts["waves"] > 1
    assert (facts["measured_key_value_bytes"] == facts["key_value_bytes"]) != window
    assert facts["measured_key_value_bytes"] <= facts["key_value_bytes"]
