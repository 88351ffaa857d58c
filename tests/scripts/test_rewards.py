"""Rewards of `grpo` and `rloo` by name, as TRL's scripts take them."""

import sys

import pytest
from trl.rewards import think_format_reward

from trl_singlepass.scripts.run import load_rewards


def test_rewards_are_trls_or_imported(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text("def short(completions, **_):\n    return [0.0 for _ in completions]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    model, trls, punishment, own = load_rewards(
        "a/model", ["think_format_reward", "get_soft_overlong_punishment", "own_rewards.short"]
    )
    assert model == "a/model"
    assert trls is think_format_reward
    assert punishment(completion_ids=[[1, 2]]) == [0]
    assert own(["a", "b"]) == [0.0, 0.0]


@pytest.mark.parametrize("names", [None, ["no_such_reward"], ["trl.rewards.no_such_reward"]])
def test_what_is_no_reward_is_named(names):
    with pytest.raises(ValueError, match="reward_funcs"):
        load_rewards(None, names)
