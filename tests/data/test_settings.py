"""Settings that determine rows: plain strings are as good as members, and the smaller length bounds a sample."""

import pytest

from trl_singlepass.data.selection import OverlongTurns
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.data.weights import LossReduction


def test_a_string_and_its_member_are_cached_under_one_name():
    members = RowSettings(overlong_turns=OverlongTurns.DROP, loss_reduction=LossReduction.TURN)
    assert repr(RowSettings(overlong_turns="drop", loss_reduction="turn")) == repr(members)


@pytest.mark.parametrize(
    ("lengths", "bound", "longest"),
    [
        ({}, None, None),
        ({"max_length": 9}, "max_length", 9),
        ({"max_row_tokens": 8}, "max_row_tokens", 8),
        ({"max_length": 9, "max_row_tokens": 8}, "max_row_tokens", 8),
        ({"max_length": 8, "max_row_tokens": 9}, "max_length", 8),
    ],
)
def test_the_smaller_length_bounds_a_sample(lengths, bound, longest):
    settings = RowSettings(**lengths)
    assert (settings.bound, settings.longest_sample) == (bound, longest)
