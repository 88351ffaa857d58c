"""The settings in `train --help` and `dpo --help` are those of the configs."""

import pytest
from trl import DPOConfig, SFTConfig

from support.trainers import own_settings
from trl_singlepass import SinglePassDPOConfig, SinglePassSFTConfig
from trl_singlepass.cli.train_help import format_train_help, read_settings


@pytest.mark.parametrize(
    ("command", "config", "of_trl"),
    [("train", SinglePassSFTConfig, SFTConfig), ("dpo", SinglePassDPOConfig, DPOConfig)],
)
def test_settings_are_those_that_the_config_adds_or_changes(command, config, of_trl):
    ours, theirs = config.__dataclass_fields__, of_trl.__dataclass_fields__
    settings = list(read_settings(command))
    assert {item.name for item in settings} >= ours.keys() - theirs.keys()
    assert [item.name for item in settings] == own_settings(config)
    for item in settings:
        field = ours[item.name]
        assert (item.default, item.help) == (str(field.default), field.metadata["help"])


@pytest.mark.parametrize("command", ["train", "dpo"])
def test_help_fits_a_terminal(command):
    text = format_train_help(command, command, f"trl-singlepass {command}")
    assert "--max_row_tokens" in text
    assert max(map(len, text.splitlines())) <= 100
