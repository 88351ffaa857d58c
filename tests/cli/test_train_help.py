"""The settings in `train --help` are those of the config."""

from trl import SFTConfig

from trl_singlepass import SinglePassSFTConfig
from trl_singlepass.cli.train_help import format_train_help, read_settings


def test_settings_are_those_that_the_config_adds_or_changes():
    ours, theirs = SinglePassSFTConfig.__dataclass_fields__, SFTConfig.__dataclass_fields__
    settings = list(read_settings())
    assert {item.name for item in settings} >= ours.keys() - theirs.keys()
    assert [item.name for item in settings] == list(SinglePassSFTConfig.__annotations__)
    for item in settings:
        field = ours[item.name]
        assert (item.default, item.help) == (str(field.default), field.metadata["help"])


def test_help_fits_a_terminal():
    text = format_train_help("train", "trl-singlepass train")
    assert "--max_row_tokens" in text
    assert max(map(len, text.splitlines())) <= 100
